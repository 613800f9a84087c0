"""The cost of an encoded image: one worker against OpenCV's two calls alone.

    PYTHONPATH=tests/helpers python tests/benchmarks/images.py [SECONDS [ROUNDS]]

JPEGs go to a model of 224x224 that does hardly anything: its output is a pixel. CPU time in microseconds for an image.
"Two calls" are cv2.imdecode and cv2.resize in a loop in another process; "converted" adds the conversion to the model's
precision between them, which the rules require. "Read" is ImageReader alone, "request" the worker's time for the whole
request. Needs wrk (Debian: apt-get install wrk).
"""

import itertools
import os
import struct
import time

import cv2
import model_zoo
import numpy as np
from measure import benchmark, load, pack, print_header, print_row
from openvino import Type, opset15
from service import serve, write_config

from ovms_rest.models.images import ImageLimits, ImageReader
from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Dim, TensorMetadata

CONNECTIONS = 2
# Height, width, images in a request.
CASES = ((480, 640, 1), (480, 640, 8), (1080, 1920, 1), (3000, 4000, 1))
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


def pixel(element_type, images):
    """Make a model x [images,224,224,3] -> y [images,1,1,3], the first pixel of each."""
    x = model_zoo.parameter("x", (images, HEIGHT, WIDTH, 3), element_type)
    start, stop, step = (np.int64(values) for values in ([0, 0], [1, 1], [1, 1]))
    return model_zoo.model_of({"y": opset15.slice(x, start, stop, step, np.int64([1, 2]))}, [x])


def request(file, images):
    """Return body and headers of a request with copies of a file."""
    tensor = {"name": "x", "datatype": "BYTES", "shape": [images]}
    return pack(tensor, (struct.pack("<I", file.size) + file.tobytes()) * images)


def loop(call, seconds):
    """Call repeatedly in a forked process; return the CPU microseconds of a call."""
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


def calls(datatype, file, images):
    """Return the calls that need no server, by name."""
    dtype = DTYPES[datatype]
    dims = tuple(Dim(size, size) for size in (images, HEIGHT, WIDTH, 3))
    reader = ImageReader(TensorMetadata("x", datatype, dims), "NHWC", ImageLimits())
    strings = BytesArray.of([file.tobytes()] * images, (images,))
    size = (WIDTH, HEIGHT)

    def resize_each(*dtypes):
        for _ in range(images):
            image = cv2.imdecode(file, cv2.IMREAD_UNCHANGED)
            for dtype in dtypes:
                image = image.astype(dtype, copy=False)
            cv2.resize(image, size)

    return {
        "two calls": resize_each,
        "converted": lambda: resize_each(dtype),
        "read": lambda: reader.read(strings, "input 'x'"),
    }


def main():
    columns = ("two calls", "converted", "read", "request")
    with benchmark(5, 4) as (directory, seconds, rounds):
        print_header("JPEG, model", *columns, "read / two calls", "request / two calls", "request / converted")
        entries = []
        for (datatype, element_type), images in itertools.product(ELEMENT_TYPES.items(), {case[2] for case in CASES}):
            name = f"{datatype}-{images}"
            model_zoo.save(pixel(element_type, images), directory / name)
            entries.append({"name": name, "base_path": name, "layout": "NHWC"})
        with serve(directory, "-w", "1", config=write_config(directory, *entries)) as service:
            service.wait_for_workers(1)
            for (height, width, images), datatype in itertools.product(CASES, ELEMENT_TYPES):
                file = photo(height, width)
                results = {column: [] for column in columns}
                for _ in range(rounds):
                    for column, call in calls(datatype, file, images).items():
                        results[column].append(loop(call, seconds) / images)
                    body, headers = request(file, images)
                    path = f"/v2/models/{datatype}-{images}/infer"
                    measured = load(service, directory, path, body, CONNECTIONS, seconds, **headers)
                    results["request"].append(measured.cpu * 1e3 / images)
                means = [sum(values) / rounds for values in results.values()]
                bare, converted, read, whole = means
                ratios = (read / bare, whole / bare, whole / converted)
                label = f"{width}x{height}, {datatype}" + (f", {images} in a request" if images > 1 else "")
                print_row(label, *(f"{value:.0f}" for value in means), *(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
