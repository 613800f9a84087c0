"""The cost of one request, through a real service: a few bytes on the wire neither block a worker nor take memory."""

import gzip
import re

import model_zoo
import pytest
from gif_writer import gif
from openvino import Type
from processes import memory, reset_peak, spent
from service import serve, write_config

GZIP = {"Content-Encoding": "gzip"}
RELU = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
FEW = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]'


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service of one worker with a model for numbers, one for images of any number and size, and one for rows."""
    directory = tmp_path_factory.mktemp("bounds")
    model_zoo.save(model_zoo.relu(), directory / "relu")
    model_zoo.save(model_zoo.relu((-1, -1, -1, -1), Type.u8), directory / "pictures")
    model_zoo.save(model_zoo.matrix(), directory / "rows")
    config = write_config(
        directory,
        {"name": "relu", "base_path": "relu"},
        {"name": "pictures", "base_path": "pictures", "layout": "NHWC"},
        {"name": "rows", "base_path": "rows"},
    )
    with serve(directory, "-w", "1", config=config, OVMS_REST_METRICS_ENABLE="true") as running:
        assert running.infer("relu", RELU).status == 200
        yield running


def post(service, model, body, binary=None):
    """Send a body with gzip; return the response, the worker's seconds, and the MiB by which its peak rose."""
    (pid,) = service.workers()
    headers = GZIP if binary is None else {**GZIP, "Inference-Header-Content-Length": str(len(body))}
    data = gzip.compress(body + (binary or b""))
    assert len(data) < 250_000
    reset_peak(pid)
    before, started = memory(pid, "VmHWM"), spent(pid)
    answer = service.request("POST", f"/v2/models/{model}/infer", data, headers)
    assert service.workers() == [pid]
    return answer, spent(pid) - started, (memory(pid, "VmHWM") - before) / 2**20


@pytest.mark.parametrize("junk", [b"{}", b"[]", b'""', b'{"":1}'])
def test_json_of_too_many_values_is_413(service, junk):
    """15 KB that decompress to {},{},... took 517 MiB."""
    answer, seconds, mebibytes = post(service, "relu", FEW + b',"junk":[' + (junk + b",") * 20_000_000 + b"1]}")
    assert (answer.status, seconds < 1.5) == (413, True)
    assert answer.json()["error"].startswith("the values of the JSON would take ")
    assert mebibytes < (len(junk) + 1) * 20_000_000 / 2**20 + 16  # the body itself


def test_example_of_15_kb_takes_no_more_memory_than_its_size(service):
    answer, _, mebibytes = post(service, "relu", FEW + b',"junk":[' + b"{}," * 5_000_000 + b"{}]}")
    assert answer.status == 413
    assert mebibytes < 32


def test_a_million_inputs_are_refused_immediately(service):
    """They made the worker exceed gunicorn's timeout."""
    item = b'{"name":"x","shape":[0],"datatype":"FP32"},'
    answer, seconds, _ = post(service, "relu", b'{"inputs":[' + (item * 1_000_000)[:-1] + b"]}", b"")
    assert (answer.status, seconds < 1) == (413, True)
    answer, seconds, _ = post(service, "relu", b'{"inputs":[' + (item * 20_000)[:-1] + b"]}", b"")
    assert (answer.status, answer.json()["error"], seconds < 0.5) == (
        400,
        "inputs has 20000 entries, but model 'relu' has only 1: 'x'; inputs[1] 'x' is repeated",
        True,
    )


def test_too_many_outputs_are_refused_before_they_are_decoded(service):
    answer, _, _ = post(service, "relu", FEW + b',"outputs":[' + b'{"name":"y"},' * 999 + b'{"name":"y"}]}')
    message = "outputs has 1000 entries, but model 'relu' has only 1: 'y'; outputs[1] 'y' is repeated"
    assert (answer.status, answer.json()["error"]) == (400, message)


def test_thousands_of_tiny_images_are_refused_before_they_are_decoded(service):
    """1.8 KB that decompress to 3,000 GIFs blocked the worker for 7 s."""
    file = gif(1, 1, [4] * 255 + [0, 5], bits=2)
    head = b'{"inputs":[{"name":"x","shape":[3000],"datatype":"BYTES"}]}'
    answer, seconds, _ = post(service, "pictures", head, (len(file).to_bytes(4, "little") + file) * 3000)
    assert (answer.status, seconds < 0.5) == (400, True)
    assert re.match("input 'x': up to image 34, decoding 35 pixels takes as much work", answer.json()["error"])


def test_too_many_strings_in_a_few_bytes_are_refused(service):
    head = b'{"inputs":[{"name":"rows","shape":[%d],"datatype":"BYTES"}]}' % (2**23 + 1)
    answer, seconds, _ = post(service, "rows", head, bytes(4 * (2**23 + 1)))
    assert (answer.status, seconds < 0.5) == (400, True)
    assert "the request has 8388609 strings up to here, at most 8388608 are allowed" in answer.json()["error"]


def test_scrapes_do_not_delay_an_inference(service):
    (pid,) = service.workers()
    before = spent(pid)
    assert all(service.get("/metrics").status == 200 for _ in range(20))
    assert service.infer("relu", RELU).status == 200
    assert spent(pid) - before < 2
