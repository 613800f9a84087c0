"""What an encoded image costs the server: one worker against OpenCV's two calls alone.

    PYTHONPATH=tests python tests/benchmarks/images.py [SECONDS [ROUNDS]]

A JPEG goes to a model of 224x224 that does next to nothing, it answers a pixel. CPU time in microseconds. "Two calls"
are cv2.imdecode and cv2.resize in a loop in another process, "converted" has the model's precision between them, which
the rules ask for. "Read" is ImageReader alone, "request" the worker's time for all of a request. Needs wrk (Debian:
apt-get install wrk).
"""

import itertools
import json
import os
import struct
import tempfile
import time
from pathlib import Path

import cv2
import model_zoo
import numpy as np
from measure import arguments, load, machine
from openvino import Type, opset15
from service import serve, write_config

from ovms_rest.models.images import ImageLimits, ImageReader
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, TensorMetadata

CONNECTIONS = 2
SIZES = ((480, 640), (1080, 1920), (3000, 4000))
HEIGHT, WIDTH = 224, 224
ELEMENT_TYPES = {"UINT8": Type.u8, "FP32": Type.f32}
DTYPES = {"UINT8": np.uint8, "FP32": np.float32}


def photo(height, width):
    """Encode a picture with the spectrum of a photograph: noise at every scale."""
    random = np.random.default_rng(0)
    picture = np.zeros((height, width, 3), np.float32)
    for scale in (1, 2, 4, 8, 16, 32, 64):
        noise = random.standard_normal((height // scale + 1, width // scale + 1, 3), np.float32)
        picture += scale**0.75 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
    return cv2.imencode(".jpg", picture.astype(np.uint8))[1]


def pixel(element_type):
    """Make the model: x [1,224,224,3] -> its first pixel, y [1,1,1,3]."""
    x = model_zoo.parameter("x", (1, HEIGHT, WIDTH, 3), element_type)
    start, stop, step = (np.int64(values) for values in ([0, 0], [1, 1], [1, 1]))
    return model_zoo.model_of({"y": opset15.slice(x, start, stop, step, np.int64([1, 2]))}, [x])


def request(file):
    """Make the body and the header of the request with a file."""
    head = json.dumps({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}]}).encode()
    body = head + struct.pack("<I", file.size) + file.tobytes()
    return body, {"Inference_Header_Content_Length": str(len(head))}


def loop(call, seconds):
    """Call again and again in a forked process; return the CPU microseconds of a call."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        cv2.setNumThreads(1)
        deadline, count, started = time.monotonic() + seconds, 0, time.process_time()
        while time.monotonic() < deadline:
            call()
            count += 1
        os.write(writing, str((time.process_time() - started) / count * 1e6).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        result = float(stream.read())
    os.wait()
    return result


def calls(datatype, file):
    """Return what runs without a server, by name."""
    dtype = DTYPES[datatype]
    dims = tuple(Dim(size, size) for size in (1, HEIGHT, WIDTH, 3))
    reader = ImageReader(TensorMetadata("x", datatype, dims), "NHWC", ImageLimits())
    strings = BytesArray.of([file.tobytes()], (1,))
    size = (WIDTH, HEIGHT)
    return {
        "two calls": lambda: cv2.resize(cv2.imdecode(file, cv2.IMREAD_UNCHANGED), size),
        "converted": lambda: cv2.resize(cv2.imdecode(file, cv2.IMREAD_UNCHANGED).astype(dtype, copy=False), size),
        "read": lambda: reader.read(strings, "input 'x'"),
    }


def main():
    """Measure and print the table."""
    seconds, rounds = arguments(5, 4)
    print(f"{machine()}; {rounds} rounds of {seconds} s\n")
    columns = ("two calls", "converted", "read", "request")
    ratios = ("read / two calls", "request / two calls", "request / converted")
    print(f"| {' | '.join(('JPEG, model', *columns, *ratios))} |")
    print("|---" * (1 + len(columns) + len(ratios)) + "|")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        entries = []
        for datatype, element_type in ELEMENT_TYPES.items():
            model_zoo.save(pixel(element_type), directory / datatype)
            entries.append({"name": datatype, "base_path": datatype, "layout": "NHWC"})
        with serve(directory, "-w", "1", config=write_config(directory, *entries)) as service:
            service.wait_for(lambda: len(service.workers()) == 1)
            for size, datatype in itertools.product(SIZES, ELEMENT_TYPES):
                file = photo(*size)
                results = {column: [] for column in columns}
                for _ in range(rounds):
                    for column, call in calls(datatype, file).items():
                        results[column].append(loop(call, seconds))
                    body, headers = request(file)
                    path = f"/v2/models/{datatype}/infer"
                    measured = load(service, directory, path, body, CONNECTIONS, seconds, **headers)
                    results["request"].append(measured.cpu * 1e3)
                means = [sum(values) / rounds for values in results.values()]
                bare, converted, read, whole = means
                shown = (read / bare, whole / bare, whole / converted)
                print(
                    f"| {size[1]}x{size[0]}, {datatype} | {' | '.join(f'{value:.0f}' for value in means)} "
                    f"| {' | '.join(f'{value:.2f}' for value in shown)} |"
                )


if __name__ == "__main__":
    main()
