"""Real models from packages on PyPI: the service's responses against OpenVINO's results, and their cost.

    pip install --no-deps --target MODELS magika==1.0.3 nudenet==3.4.2 rapidocr-onnxruntime==1.4.4
    PYTHONPATH=tests/helpers python tests/benchmarks/real_models.py MODELS [SECONDS [ROUNDS]]

Each model gets inputs of several shapes as JSON, as binary data, and as pictures where it accepts them. Every response
must equal OpenVINO's result bit for bit. The table has the CPU microseconds of a request to one worker, and of the
inference alone in a loop in another process; for a picture the latter includes decoding and resizing. Needs wrk
(Debian: apt-get install wrk).
"""

import json
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from images import loop, photo
from measure import benchmark, load, mean, pack, print_header, print_row
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

    `picture` is the height and width of the pictures that it accepts, in the order `colors`, after `mean` and `scale`.
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
        "magika",  # the kind of a file by its bytes
        "magika/models/standard_v3_3/model.onnx",
        "bytes",
        [RANDOM.integers(0, 257, (batch, 2048)).astype(np.int32) for batch in (1, 8)],
    ),
    Subject("nudenet", "nudenet/320n.onnx", "images", [planes(1, 3, 320, 320), planes(2, 3, 160, 256)], (320, 320)),
    Subject(
        "rapidocr-det",  # the places of text in a picture
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
    alone: Callable[[], Any]


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
        yield Request(subject.name, f"binary, {shape}", *pack(described, array.tobytes()), alone)
    if subject.picture:
        infer_picture = compile_alone(preprocess(subject, openvino.Core().read_model(directory / subject.file)))
        for height, width in ((480, 640), subject.picture):
            file = photo(height, width)
            described = {"name": subject.input, "shape": [1], "datatype": "BYTES"}
            data = struct.pack("<I", file.size) + file.tobytes()

            def alone_with_picture(file: np.ndarray = file) -> list[np.ndarray]:
                return infer_picture(read_picture(file, subject.picture))

            form = f"JPEG, {width}x{height}"
            yield Request(f"{subject.name}-picture", form, *pack(described, data), alone_with_picture)


def infer_served(service: Service, request: Request) -> dict[str, np.ndarray]:
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


Prepare = Callable[[Path, Path], tuple[Path, Iterable[Request]]]
Compare = Callable[[Request, dict[str, np.ndarray], Any], tuple[str, bool]]


def run(document: str, column: str, prepare: Prepare, compare: Compare) -> int:
    """Compare, measure and print a table; return 1 if a response differs.

    `prepare` returns a config and requests for a directory of packages and another one; `compare` returns the text in
    `column` for a request, its response and OpenVINO's result, and whether they are equal.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(document)
        return 2
    packages = Path(sys.argv.pop(1)).resolve()
    faults = 0
    with benchmark(4, 3) as (directory, seconds, rounds):
        config, requests = prepare(packages, directory)
        print_header("model", "request", "bytes", column, "requests/s", "CPU us", "alone, CPU us", "ratio")
        with serve(directory, "-w", "1", config=config) as service:
            service.wait_for_workers(1)
            for request in requests:
                text, is_equal = compare(request, infer_served(service, request), request.alone())
                faults += not is_equal
                path = f"/v2/models/{request.model}/infer"
                loads, loops = [], []
                for _ in range(rounds):
                    loads.append(load(service, directory, path, request.body, CONNECTIONS, seconds, **request.headers))
                    loops.append(loop(request.alone, seconds))
                cost, bare = mean(loads).cpu * 1e3, sum(loops) / rounds
                figures = (f"{figure:.0f}" for figure in (mean(loads).rate, cost, bare))
                print_row(request.model, request.form, len(request.body), text, *figures, f"{cost / bare:.2f}")
    return 1 if faults else 0


def prepare(packages: Path, directory: Path) -> tuple[Path, Iterable[Request]]:
    config = write_config(directory, *(entry for subject in SUBJECTS for entry in configure(subject, packages)))
    return config, (request for subject in SUBJECTS for request in make_requests(subject, packages))


def compare(_: Request, served: dict[str, np.ndarray], alone: list[np.ndarray]) -> tuple[str, bool]:
    is_equal = [each.tobytes() for each in served.values()] == [each.tobytes() for each in alone]
    return "same" if is_equal else "DIFFERS", is_equal


if __name__ == "__main__":
    sys.exit(run(__doc__, "response", prepare, compare))
