"""Real models that packages on PyPI ship: served answers against OpenVINO's in this process, and what they cost.

    pip install --no-deps --target MODELS magika==1.0.3 nudenet==3.4.2 rapidocr-onnxruntime==1.4.4
    PYTHONPATH=tests/helpers python tests/benchmarks/real_models.py MODELS [SECONDS [ROUNDS]]

Each model gets inputs of several shapes as JSON, as binary, and as pictures where it takes them. Every answer has to be
that of OpenVINO, bit for bit. The table has CPU microseconds of a request to one worker and of the inference alone, in
a loop in another process; for a picture the latter includes decoding and resizing it. Needs wrk (Debian: apt-get
install wrk).
"""

import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from images import loop, photo
from measure import load, machine, mean
from service import Service, serve, write_config

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import openvino
from openvino.preprocess import ColorFormat, PrePostProcessor

from ovms_rest.models.compilation import plan_compilation

CONNECTIONS = 2
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
DATATYPES = {np.dtype(np.float32): "FP32", np.dtype(np.int32): "INT32"}
RANDOM = np.random.default_rng(0)


class Subject(NamedTuple):
    """A model: its file below the directory of packages, its input, and arrays to send.

    `picture` is the height and width that it takes pictures of, after `mean` and `scale`, in the order of its channels.
    """

    name: str
    file: str
    input: str
    arrays: list[np.ndarray]
    picture: tuple[int, int] | None = None
    colors: str = "RGB:BGR"
    mean: float = 0
    scale: float = 255


def planes(*shape: int) -> np.ndarray:
    return RANDOM.random(shape, np.float32)


SUBJECTS = [
    Subject(
        "magika",  # what kind of file these bytes are
        "magika/models/standard_v3_3/model.onnx",
        "bytes",
        [RANDOM.integers(0, 257, (batch, 2048)).astype(np.int32) for batch in (1, 8)],
    ),
    Subject("nudenet", "nudenet/320n.onnx", "images", [planes(1, 3, 320, 320), planes(2, 3, 160, 256)], (320, 320)),
    Subject(
        "rapidocr-det",  # where text is in a picture
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "x",
        [planes(1, 3, 224, 320), planes(1, 3, 64, 96), planes(2, 3, 96, 64)],
    ),
    Subject(
        "rapidocr-cls",  # whether a line of text is upside down
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "x",
        [planes(1, 3, 48, 192), planes(6, 3, 48, 192)],
        (48, 192),
        "BGR:BGR",
        127.5,
        127.5,
    ),
]


# --- OpenVINO alone


def compile_alone(model: openvino.Model) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Compile a model as the service does; return its inference."""
    plan = plan_compilation("CPU", EXACT, cores=2)
    request = openvino.Core().compile_model(model, plan.device, dict(plan.properties)).create_infer_request()

    def infer(array: np.ndarray) -> list[np.ndarray]:
        request.infer([array])
        return [np.array(tensor.data) for tensor in request.output_tensors]

    return infer


def preprocess(subject: Subject, model: openvino.Model) -> openvino.Model:
    """Make a model accept resized pictures in OpenCV's form, by means of OpenVINO."""
    processor = PrePostProcessor(model)
    info = processor.input(0)
    info.model().set_layout(openvino.Layout("NCHW"))
    info.tensor().set_layout(openvino.Layout("NHWC")).set_element_type(openvino.Type.f32)
    if subject.colors != "BGR:BGR":
        info.tensor().set_color_format(ColorFormat.BGR)
        info.preprocess().convert_color(ColorFormat.RGB)
    if subject.mean:
        info.preprocess().mean(subject.mean)
    info.preprocess().scale(subject.scale)
    changed = processor.build()
    changed.reshape([1, *subject.picture, 3])
    return changed


def read_picture(file: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decode and resize a picture as the service does (protocol/README.md section 6): in the model's precision."""
    picture = cv2.imdecode(file, cv2.IMREAD_UNCHANGED).astype(np.float32)
    return cv2.resize(picture, (size[1], size[0]))[None]


# --- Requests


class Request(NamedTuple):
    """A request, and the same inference by OpenVINO alone."""

    model: str
    form: str
    body: bytes
    headers: dict[str, str]
    alone: Callable[[], list[np.ndarray]]


def make_requests(subject: Subject, directory: Path) -> Iterator[Request]:
    """Make requests with all arrays of a subject, in every form."""
    read = openvino.Core().read_model(directory / subject.file)
    infer = compile_alone(read)
    for array in subject.arrays:
        described = {"name": subject.input, "shape": array.shape, "datatype": DATATYPES[array.dtype]}
        shape = "x".join(map(str, array.shape))

        def alone(array: np.ndarray = array) -> list[np.ndarray]:
            return infer(array)

        body = json.dumps({"inputs": [{**described, "data": array.ravel().tolist()}]}).encode()
        yield Request(subject.name, f"JSON, {shape}", body, {}, alone)
        yield pack(subject.name, f"binary, {shape}", described, array.tobytes(), alone)
    if subject.picture:
        infer_picture = compile_alone(preprocess(subject, openvino.Core().read_model(directory / subject.file)))
        for height, width in ((480, 640), subject.picture):
            file = photo(height, width)
            described = {"name": subject.input, "shape": [1], "datatype": "BYTES"}
            data = struct.pack("<I", file.size) + file.tobytes()

            def alone_with_picture(file: np.ndarray = file) -> list[np.ndarray]:
                return infer_picture(read_picture(file, subject.picture))

            form = f"JPEG, {width}x{height}"
            yield pack(f"{subject.name}-picture", form, described, data, alone_with_picture)


def pack(model: str, form: str, described: dict[str, Any], data: bytes, alone: Any) -> Request:
    """Make a request with binary input and output."""
    head = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    return Request(model, form, head + data, {"Inference_Header_Content_Length": str(len(head))}, alone)


def infer_served(service: Service, request: Any) -> dict[str, np.ndarray]:
    """Send a request to the service and return the outputs."""
    answer = service.infer(request.model, request.body, **request.headers)
    assert answer.status == 200, answer.body
    at = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    outputs = {}
    for output in json.loads(answer.body[:at])["outputs"]:
        dtype = {"FP32": np.float32, "INT64": np.int64}[output["datatype"]]
        if "data" in output:
            flat = np.array(output["data"], dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            flat = np.frombuffer(answer.body[at : at + size], dtype)
            at += size
        outputs[output["name"]] = flat.reshape(output["shape"])
    return outputs


def configure(subject: Subject, directory: Path) -> Iterator[dict[str, Any]]:
    """Return the configuration of a subject, and of its variant for pictures."""
    model = {"name": subject.name, "base_path": str(directory / subject.file), "plugin_config": EXACT}
    yield model
    if subject.picture:
        keys = {"shape": [1, *subject.picture, 3], "layout": "NHWC:NCHW", "scale": subject.scale}
        if subject.mean:
            keys["mean"] = subject.mean
        if subject.colors != "BGR:BGR":
            keys["color_format"] = subject.colors
        yield {**model, **keys, "name": f"{subject.name}-picture"}


def main() -> int:
    """Return 1 if a response differs from OpenVINO's result."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    models = Path(sys.argv[1]).resolve()
    seconds, rounds = (int(value) for value in [*sys.argv[2:], *("4", "3")[len(sys.argv) - 2 :]])
    print(f"{machine()}; {rounds} rounds of {seconds} s\n")
    print("| model | request | bytes | answer | requests/s | CPU us | alone, CPU us | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        config = write_config(Path(name), *(entry for subject in SUBJECTS for entry in configure(subject, models)))
        with serve(Path(name), "-w", "1", config=config) as service:
            service.wait_for(lambda: len(service.workers()) == 1)
            for request in (request for subject in SUBJECTS for request in make_requests(subject, models)):
                served, alone = infer_served(service, request).values(), request.alone()
                is_same = [each.tobytes() for each in served] == [each.tobytes() for each in alone]
                faults += not is_same
                path = f"/v2/models/{request.model}/infer"
                loads, loops = [], []
                for _ in range(rounds):
                    loads.append(load(service, Path(name), path, request.body, CONNECTIONS, seconds, **request.headers))
                    loops.append(loop(request.alone, seconds))
                measured, bare = mean(loads), sum(loops) / rounds
                cost = measured.cpu * 1e3
                print(
                    f"| {request.model} | {request.form} | {len(request.body)} | {'same' if is_same else 'DIFFERS'} "
                    f"| {measured.rate:.0f} | {cost:.0f} | {bare:.0f} | {cost / bare:.2f} |",
                    flush=True,
                )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
