"""Requests whose bodies are data alone, sent by curl, to our own worker and to gunicorn's `sync`."""

import gzip
import json
import subprocess
import threading

import cv2
import model_zoo
import numpy as np
import pytest
from openvino import Type
from service import PATIENCE, serve

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
MIRRORED = PICTURE[::-1].copy()
PNG, OCTETS = "Content-Type: image/png", "Content-Type: application/octet-stream"
LIMIT = 20_000
MODELS = {
    "images": model_zoo.passthrough(x=(Type.u8, (-1, 4, 4, 3))),
    "batched": model_zoo.passthrough(x=(Type.u8, (-1, 4, 4, 3))),
    "relu": model_zoo.relu(),
    "strings": model_zoo.strings(),
    "add": model_zoo.add(),
    "both": model_zoo.passthrough(image=(Type.f32, (-1, 4, 4, 3)), threshold=(Type.f32, (1,))),
}
KEYS = {
    "images": {"layout": "NHWC"},
    "batched": {"layout": "NHWC", "max_batch_size": 8},
    "both": {"layout": {"image": "NHWC"}},
}


@pytest.fixture(scope="module", params=["ovms_rest", "sync"])
def service(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("service")
    config = model_zoo.save_all(directory, MODELS, lambda name: KEYS.get(name, {}))
    arguments = ["-k", "sync"] if request.param == "sync" else []
    with serve(directory, "-w", "1", *arguments, config=config, OVMS_REST_MAX_BODY_BYTES=str(LIMIT)) as running:
        running.directory = directory
        for name, data in FILES.items():
            (directory / name).write_bytes(data)
        yield running


FILES = {
    "a.png": cv2.imencode(".png", PICTURE)[1].tobytes(),
    "b.png": cv2.imencode(".png", MIRRORED)[1].tobytes(),
    "a.webp": cv2.imencode(".webp", PICTURE, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes(),
    "a.png.gz": gzip.compress(cv2.imencode(".png", PICTURE)[1].tobytes()),
    "x.bin": np.array([1, -2, 3, -4], np.float32).tobytes(),
    "brace.bin": b'{"' + bytes(30),
    "large.bin": bytes(LIMIT + 1),
    "text.json": b'{"inputs": 1}',
}


def curl(service, model, *arguments, status=200):
    """Run curl in the directory of the files; return the outputs of the response by name, or its error."""
    url = f"http://127.0.0.1:{service.port}/v2/models/{model}/infer"
    command = ["curl", "-s", "-w", "%{http_code}", "--max-time", str(PATIENCE), *arguments, url]
    done = subprocess.run(command, cwd=service.directory, capture_output=True, check=True)
    answer, code = json.loads(done.stdout[:-3]), int(done.stdout[-3:])
    assert code == status, answer
    if status != 200:
        return answer["error"]
    return {output["name"]: (output["shape"], output["data"]) for output in answer["outputs"]}


def pixels(*pictures):
    return [len(pictures), *pictures[0].shape], np.stack(pictures).ravel().tolist()


@pytest.mark.parametrize("model", ["images", "batched", "images/versions/1"])
def test_image_is_sent_by_its_content_type(service, model):
    assert curl(service, model, "--data-binary", "@a.png", "-H", PNG) == {"x": pixels(PICTURE)}


def test_image_may_be_of_any_format(service):
    assert curl(service, "images", "--data-binary", "@a.webp", "-H", "Content-Type: image/webp") == {
        "x": pixels(PICTURE)
    }


@pytest.mark.parametrize(
    ("file", "header"), [("a.png", "Transfer-Encoding: chunked"), ("a.png.gz", "Content-Encoding: gzip")]
)
def test_image_may_be_chunked_or_compressed(service, file, header):
    outputs = curl(service, "images", "--data-binary", f"@{file}", "-H", PNG, "-H", header)
    assert outputs == {"x": pixels(PICTURE)}


@pytest.mark.parametrize("model", ["images", "batched"])
def test_several_images_are_parts_of_a_form(service, model):
    outputs = curl(service, model, "-F", "x=@a.png", "-F", "x=@b.png", "-F", "x=@a.webp")
    assert outputs == {"x": pixels(PICTURE, MIRRORED, PICTURE)}


def test_image_may_be_base64_in_json(service):
    encoded = subprocess.run(["base64", "-w", "0", service.directory / "b.png"], capture_output=True, check=True).stdout
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": [{"b64": encoded.decode()}]}
    assert curl(service, "images", "-d", json.dumps({"inputs": [tensor]})) == {"x": pixels(MIRRORED)}


def test_form_has_the_inputs_of_a_model(service):
    expected = {"image": pixels(PICTURE), "threshold": ([1], [0.5])}
    assert curl(service, "both", "-F", "image=@a.png", "-F", "threshold=0.5") == expected
    np.array([0.5], np.float32).tofile(service.directory / "half.bin")
    assert curl(service, "both", "-F", "threshold=@half.bin", "-F", "image=@a.png") == expected
    flat = json.dumps(PICTURE.ravel().tolist())
    shaped = 'image=@floats.bin;headers="X-Tensor-Shape: 1,4,4,3"'
    PICTURE.astype(np.float32).tofile(service.directory / "floats.bin")
    assert curl(service, "both", "-F", shaped, "-F", "threshold=[0.5]") == expected
    assert curl(service, "both", "-F", f"image={flat}", "-F", "threshold=[0.5]") == expected


def test_strings_are_parts_of_a_form_or_a_body(service):
    assert curl(service, "strings", "-F", "text=a b", "-F", "text=@text.json") == {
        "text": ([2], ["a b", FILES["text.json"].decode()])
    }
    assert curl(service, "strings", "--data-binary", "a b", "-H", OCTETS) == {"text": ([1], ["a b"])}


def test_raw_elements_have_the_shape_of_the_model_or_a_header(service):
    expected = {"y": ([1, 4], [1, 0, 3, 0])}
    assert curl(service, "relu", "--data-binary", "@x.bin", "-H", OCTETS) == expected
    assert curl(service, "relu", "--data-binary", "@x.bin", "-H", OCTETS, "-H", "X-Tensor-Shape: 1,4") == expected
    assert curl(service, "relu", "--data-binary", "@x.bin", "-H", OCTETS, "-H", "X-Tensor-Shape: 4", status=400) == (
        "input 'x': shape is [4], the model takes [-1,4]"
    )


def test_raw_elements_that_begin_like_json_need_a_shape(service):
    send = ("--data-binary", "@brace.bin", "-H", OCTETS)
    assert curl(service, "relu", *send, status=400).startswith("the request is not valid JSON")
    shape, data = curl(service, "relu", *send, "-H", "X-Tensor-Shape: 2,4")["y"]
    assert (shape, data[1:]) == ([2, 4], [0] * 7)
    assert data[0] > 0
    text = ("--data-binary", "@text.json", "-H", OCTETS)
    assert curl(service, "strings", *text, status=400) == (
        "inputs is the number 1, expected an array of one or more objects; the body begins like JSON, and "
        "application/octet-stream that does so needs the header X-Tensor-Shape"
    )
    assert curl(service, "strings", *text, "-H", "X-Tensor-Shape: 1") == {"text": ([1], [FILES["text.json"].decode()])}


@pytest.mark.parametrize(
    "content_type", [PNG, OCTETS, "Content-Type: multipart/form-data; boundary=B", "Content-Type:"]
)
def test_request_in_json_may_have_any_content_type(service, content_type):
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, -2, 3, -4]}
    outputs = curl(service, "relu", "-d", json.dumps({"inputs": [tensor]}), "-H", content_type)
    assert outputs == {"y": ([1, 4], [1, 0, 3, 0])}


def test_header_length_takes_precedence_over_the_content_type(service):
    head = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32"}]}'
    (service.directory / "binary.bin").write_bytes(head + FILES["x.bin"])
    send = ("--data-binary", "@binary.bin", "-H", f"Inference-Header-Content-Length: {len(head)}")
    for content_type in (PNG, OCTETS):
        assert curl(service, "relu", *send, "-H", content_type, "-H", "X-Tensor-Shape: 9") == {
            "y": ([1, 4], [1, 0, 3, 0])
        }


@pytest.mark.parametrize(
    ("model", "arguments", "error"),
    [
        ("add", ("--data-binary", "@x.bin", "-H", OCTETS), "has 2 inputs: 'left', 'right'; send multipart/form-data "),
        (
            "relu",
            ("--data-binary", "@a.png", "-H", PNG),
            "input 'x' of model 'relu' does not take images; it takes FP32 ",
        ),
        (
            "images",
            ("--data-binary", "@x.bin", "-H", PNG),
            "input 'x': image 0 cannot be decoded, expected a complete ",
        ),
        ("images", ("--data-binary", "@missing", "-H", PNG), "input 'x': image 0 is empty, expected a complete file "),
        ("images", ("-F", "picture=@a.png"), "model 'images' has no input 'picture'; it has 'x'"),
        ("images", ("--data-binary", "@a.png"), "it is a PNG file; send it with its Content-Type: curl "),
        ("add", ("-F", "left=[1,2,3]"), "input 'right' of model 'add' is missing from the request"),
        (
            "images",
            ("--data-binary", "@a.png", "-H", "Content-Type: multipart/form-data"),
            "without a valid boundary of ",
        ),
    ],
)
def test_body_that_does_not_fit_the_model_is_a_400(service, model, arguments, error):
    assert error in curl(service, model, *arguments, status=400)


@pytest.mark.parametrize("arguments", [("--data-binary", "@large.bin", "-H", PNG), ("-F", "x=@large.bin")])
def test_body_over_the_limit_is_a_413(service, arguments):
    assert f"at most {LIMIT} are allowed" in curl(service, "images", *arguments, "-H", "Expect:", status=413)


def test_compressed_body_over_the_limit_is_a_413(service):
    (service.directory / "bomb.gz").write_bytes(gzip.compress(bytes(LIMIT + 1)))
    send = ("--data-binary", "@bomb.gz", "-H", "Content-Encoding: gzip", "-H", PNG)
    assert str(LIMIT) in curl(service, "images", *send, status=413)


def test_images_that_are_inferred_together_are_answered_apart(service):
    answers = {}

    def send(index):
        picture = np.full((4, 4, 3), index, np.uint8)
        body = cv2.imencode(".png", picture)[1].tobytes()
        answers[index] = service.infer("batched", body, Content_Type="image/png").json()["outputs"][0]["data"]

    threads = [threading.Thread(target=send, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {index: [index] * 48 for index in range(16)}
