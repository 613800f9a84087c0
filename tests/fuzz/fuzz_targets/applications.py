"""The whole application: a request as HTTP, through the reader of heads, Falcon, the resources and a model.

The input: the head and the body. What goes wrong must be the client's fault: no status of 500 or more.
"""

import io
import json
from typing import Any

from fake_app import by_name, doubler, make, servable, speaker
from fuzz_json import make_mutator
from fuzz_oracles import check_message
from gunicorn.config import Config
from raw_http import head, post
from request_cases import CONVERSATION

from ovms_rest.protocol.tensors import Dim, Tensor
from ovms_rest.worker.http1 import HeadReader, Refusal, RequestBody

MAX_LENGTH = 3000
TOKENS = [
    *(
        b"/v2/models/m/infer",
        b"/v1/models/m:predict",
        b"/v2/models/speaker/infer",
        b"/v2/models/echo",
        b"/ready",
        b"/metadata",
    ),
    *(
        b"Content-Type: image/png\r\n",
        b"Content-Type: application/octet-stream\r\n",
        b"X-Tensor-Shape: 1\r\n",
        b"POST ",
        b"GET ",
    ),
    *(
        b"Inference-Header-Content-Length: 0\r\n",
        b"Content-Encoding: gzip\r\n",
        b"Accept-Encoding: gzip\r\n",
        b"HEAD ",
        b"OPTIONS ",
    ),
    *(
        b"Content-Type: multipart/form-data; boundary=b\r\n",
        b"/versions/1",
        b":classify",
        b"X-Request-Start: t=1.5\r\n",
        b"%2F",
    ),
    *(
        b"/v2/health/live",
        b"/v2/health/ready",
        b"Origin: http://x\r\n",
        b"Accept: text/html\r\n",
        b"Cookie: a=b\r\n",
        b"?a=%ff",
    ),
    *(
        b'"inputs"',
        b'"outputs"',
        b'"data"',
        b'"BYTES"',
        b'"FP32"',
        b'"parameters"',
        b'"classification"',
        b'"binary_data"',
    ),
]
_TEMPLATE = {
    "wsgi.url_scheme": "http",
    "SERVER_NAME": "127.0.0.1",
    "SERVER_PORT": "8000",
    "SCRIPT_NAME": "",
    "REMOTE_ADDR": "127.0.0.1",
    "wsgi.version": (1, 0),
    "wsgi.multithread": False,
    "wsgi.multiprocess": True,
}
_ANY = Dim(0, None)
_TENSORS = {"b": ("BOOL", (_ANY,)), "f": ("BF16", (_ANY, _ANY)), "s": ("BYTES", (_ANY,))}


def _echo(arrays: Any) -> Any:
    return by_name(*(Tensor(name, _TENSORS[name][0], array) for name, array in arrays.items()))


_READER = HeadReader(Config())
_APP = make(
    doubler(),
    speaker(b"\xff"),
    servable(_echo, _TENSORS, _TENSORS, "echo"),
    response_compression=True,
    allowed_origins="*",
    max_body_bytes=10_000,
)


def seeds() -> list[bytes]:
    """Return a request to every route, and requests of every form."""
    x = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}
    echoed = [
        {"name": "b", "shape": [1], "datatype": "BOOL", "data": [True]},
        {"name": "f", "shape": [1, 1], "datatype": "BF16", "data": [0.5]},
        {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["a"]},
    ]
    outputs = [{"name": "y", "parameters": {"classification": 1}}, {"name": "n", "parameters": {"binary_data": True}}]
    bodies = [
        ("/v2/models/m/infer", {"inputs": [x]}),
        ("/v2/models/m/infer", {"inputs": [x], "outputs": outputs, "id": "1", "parameters": {"timeout": 10**9}}),
        ("/v2/models/echo/versions/1/infer", {"inputs": echoed}),
        ("/v2/models/speaker/infer", {"inputs": [x]}),
        ("/v1/models/m:predict", {"instances": [1, 2]}),
        ("/v1/models/echo/versions/0:predict", {"inputs": {"b": [True], "f": [[1]], "s": ["a"]}}),
        ("/v1/models/m:classify", {}),
    ]
    made = [post(path, json.dumps(root).encode(), "Accept-Encoding: gzip") for path, root in bodies]
    made.append(post("/v2/models/m/infer", bytes(8), "Content-Type: application/octet-stream", "X-Tensor-Shape: 2"))
    made.append(post("/v2/models/m/infer", bytes(8), "Inference-Header-Content-Length: 0"))
    routes = (
        "/",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/m",
        "/v2/models/m/ready",
        "/v1/models/m/metadata",
        "/v3",
    )
    made += [head("GET", route, "Accept: text/html") for route in routes]
    made.append(head("OPTIONS", "/v2/models/m/infer", "Origin: http://y", "Access-Control-Request-Method: POST"))
    return [*made, *(data for data, _, _ in CONVERSATION)]


_mutate_json = make_mutator(
    0,
    ["inputs", "outputs", "name", "data", "shape", "datatype", "parameters", "instances", "classification", "b64"],
    ["x", "y", "n", "b", "f", "s", "BOOL", "BF16", "BYTES", [], {}, {"b64": "aGk="}],
)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Mutate the body as JSON, or anything as bytes."""
    head, empty, body = data.partition(b"\r\n\r\n")
    if seed % 3 and body[:1] == b"{":
        return head + empty + _mutate_json(body, max(max_size - len(head) - 4, 1), seed)
    return _mutate_json(data, max_size, seed)


def check(data: bytes) -> None:
    """Respond to a request; the body is whatever follows the head."""
    try:
        read = _READER.read(data, 0, _TEMPLATE)
    except Refusal:
        return
    if read is None:
        return
    body = RequestBody(memoryview(bytearray(data[read.size :])))
    environ = {**read.environ, "wsgi.input": body, "wsgi.errors": io.StringIO()}
    started: list[tuple[str, list[tuple[str, str]]]] = []
    parts = _APP(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
    content = b"".join(parts)
    ((status, headers),) = started
    fields = {name.lower(): value for name, value in headers}
    assert status[:3] < "500" or (status.startswith("503") and "Retry-After".lower() in fields), (
        status,
        environ["wsgi.errors"].getvalue(),
    )
    assert len(fields) == len(headers)
    assert not any(set(name + value) & set("\r\n\0") for name, value in headers)
    if environ["REQUEST_METHOD"] != "HEAD" and "content-length" in fields:
        assert fields["content-length"] == str(len(content))
    if status[:3] >= "400" and content:
        message = json.loads(content)
        assert set(message) == {"error"}
        check_message(message["error"])
