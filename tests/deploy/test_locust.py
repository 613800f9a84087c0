"""The load test in deploy/locust, run by locust against a real service and against a server with wrong responses."""

import contextlib
import http.server
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import model_zoo
import numpy as np
import pytest
import slow_models
from model_zoo import ELEMENT_TYPES
from openvino import Type
from service import PATIENCE, ROOT, Service, environment, free_port, serve, wait_for, write_config
from timeouts import keep_trying

LOCUST = ROOT / "deploy" / "locust"
SIMPLE = "text 1.5"  # a name that must be percent-encoded


_SPEC = importlib.util.spec_from_file_location("kserve", LOCUST / "kserve.py")
kserve = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kserve)

METADATA = {
    "name": "m",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [
        {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
    ],
}


# --- making requests and checking responses


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_has_the_drawn_pixels(channels):
    pixels = kserve.draw_picture(random.Random(0), 9, 14, channels)
    file = np.frombuffer(kserve.encode_png(pixels, 9, 14, channels), np.uint8)
    decoded = cv2.imdecode(file, cv2.IMREAD_UNCHANGED).reshape(9, 14, channels)
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]  # OpenCV gives BGR
    assert decoded[:, :, order].tobytes() == pixels


def test_options_set_dynamic_dims():
    tensor = {"name": "x", "datatype": "INT32", "shape": [-1, 3, -1]}
    assert kserve.choose_shape("m", tensor, kserve.Options(dynamic_dim=7)) == [7, 3, 7]
    shapes = kserve.parse_shapes("x=1,3,4; m/x=2,3,5;y=")
    assert kserve.choose_shape("m", tensor, kserve.Options(shapes=shapes)) == [2, 3, 5]
    assert kserve.choose_shape("other", tensor, kserve.Options(shapes=shapes)) == [1, 3, 4]
    assert kserve.choose_shape("m", {**tensor, "name": "y", "shape": []}, kserve.Options(shapes=shapes)) == []
    with pytest.raises(kserve.UnusableError, match=r"x of m has shape \[-1, 3, -1\], got \[2, 4, 5\]"):
        kserve.choose_shape("m", tensor, kserve.Options(shapes={"x": (2, 4, 5)}))


def test_values_are_within_the_range_and_their_datatype():
    options = kserve.Options(dynamic_dim=200, integers=(-1000, 1000))
    for datatype, low, high in (("INT8", -128, 127), ("UINT8", 0, 255), ("INT16", -1000, 1000)):
        metadata = {"name": "m", "inputs": [{"name": "x", "datatype": datatype, "shape": [-1]}]}
        values = json.loads(kserve.make_request(metadata, "json", options, 0).body)["inputs"][0]["data"]
        assert len(values) == 200
        assert low <= min(values) < max(values) <= high


def test_bf16_is_packed_as_the_upper_half_of_an_fp32():
    assert kserve.pack("BF16", [1.0, -2.5]) == struct.pack("<f", 1.0)[2:] + struct.pack("<f", -2.5)[2:]


def _response(**changes):
    outputs = [
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["é"]},
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, None]},
    ]
    return {"model_name": "m", "model_version": "1", "id": "json-0", "outputs": outputs, **changes}


LABEL, Y = _response()["outputs"]


def _with(*outputs):
    return _response(outputs=list(outputs))


def _check(response, status=200):
    request = kserve.make_request(METADATA, "json", kserve.Options(), 0)
    content = response if isinstance(response, bytes) else json.dumps(response).encode()
    kserve.check_answer(METADATA, request, status, None, content)


def test_right_json_response_passes():
    _check(_response())


@pytest.mark.parametrize(
    ("status", "response", "message"),
    [
        (500, {"error": "boom"}, "status 500: boom"),
        (404, b"<html>", "status 404: without an error in JSON"),
        (204, b"", "status 204: a pipeline found nothing"),
        (200, b"{", "the response is not JSON"),
        (200, json.dumps(_with(LABEL, Y | {"data": [1, float("nan")]})).encode(), "the response is not JSON"),
        (200, json.dumps(_response(id="é"), ensure_ascii=False).encode("latin-1"), "the response is not JSON"),
        (200, [1], "not a JSON object"),
        (200, _response(model_name="n"), "model_name differs from the request's"),
        (200, _response(id="json-1"), "id differs from the request's"),
        (200, _response(outputs=None), "outputs is not a list of tensors"),
        (200, _with(Y), "outputs are y, expected label, y"),
        (200, _with(LABEL, Y, LABEL), "outputs are label, label, y"),
        (200, _with(LABEL | {"name": "z"}, Y), "outputs are y, z"),
        (200, _with(LABEL, Y | {"datatype": "FP64"}), "y has datatype FP64, the metadata FP32"),
        (200, _with(LABEL, Y | {"shape": [2]}), r"y has shape \[2\], the metadata \[-1, 2\]"),
        (200, _with(LABEL, Y | {"shape": [1, 3], "data": [1, 2, 3]}), r"y has shape \[1, 3\], the metadata"),
        (200, _with(LABEL, Y | {"shape": [-1, 2]}), r"y has shape \[-1, 2\], the metadata"),
        (200, _with(LABEL, Y | {"data": [1, 2, 3]}), "y does not have the number of elements of its shape"),
        (200, _with(LABEL, Y | {"data": [1, "2"]}), "y has elements that are not FP32"),
        (200, _with(LABEL, Y | {"data": "12"}), "y has no data"),
        (200, _with(LABEL | {"data": [None]}, Y), "label has elements that are not BYTES"),
    ],
)
def test_wrong_json_response_is_a_failure_that_names_the_fault(status, response, message):
    with pytest.raises(kserve.WrongAnswerError, match=message):
        _check(response, status)


@pytest.mark.parametrize("status", [429, 503])
def test_refusal_of_an_overloaded_server_is_not_a_wrong_response(status):
    with pytest.raises(kserve.RefusedError, match=f"status {status}: busy"):
        _check({"error": "busy"}, status)


def _check_binary(y_size, label_size, binary, length=None, **changes):
    request = kserve.make_request(METADATA, "binary", kserve.Options(), 0)
    outputs = [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": y_size}},
        {"name": "label", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": label_size}, **changes},
    ]
    head = json.dumps(_response(id="binary-0", outputs=outputs)).encode()
    kserve.check_answer(METADATA, request, 200, length or str(len(head)), head + binary)


def test_right_binary_response_passes():
    _check_binary(8, 7, bytes(8) + b"\3\0\0\0abc")


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ((4, 7, bytes(4) + b"\3\0\0\0abc"), {}, "y does not have the number of elements"),
        ((8, 7, bytes(8) + b"\3\0\0\0ab"), {}, "label has an invalid binary_data_size"),
        ((8, 7, bytes(8) + b"\4\0\0\0abc"), {}, "label has a string that is longer than its data"),
        ((8, 3, bytes(8) + b"\0\0\0"), {}, "label has a string that is longer than its data"),
        ((8, 8, bytes(8) + bytes(8)), {}, "label does not have the number of elements"),
        ((8, 7, bytes(8) + b"\3\0\0\0abc!"), {}, "more bytes than its outputs"),
        ((8, 7, bytes(8) + b"\3\0\0\0abc"), {"data": ["abc"]}, "label is not binary"),
        ((8, 7, bytes(8) + b"\3\0\0\0abc"), {"parameters": {}}, "label is not binary"),
        ((8, 7, bytes(8) + b"\3\0\0\0abc", "99999"), {}, "Inference-Header-Content-Length is not a number within"),
        ((8, 7, bytes(8) + b"\3\0\0\0abc", "+1"), {}, "Inference-Header-Content-Length is not a number within"),
    ],
)
def test_wrong_binary_response_is_a_failure_that_names_the_fault(arguments, changes, message):
    with pytest.raises(kserve.WrongAnswerError, match=message):
        _check_binary(*arguments, **changes)


def test_only_serving_models_are_listed():
    ready, gone = [{"state": "END"}, {"state": "AVAILABLE"}], [{"state": "UNLOADING"}]
    models = {"models": [{"name": "a", "versions": ready}, {"name": "b", "versions": gone}]}
    assert kserve.check_models(200, json.dumps(models).encode()) == ["a"]
    for wrong in ({}, {"models": None}, {"models": [{}]}, {"models": ["a"]}):
        with pytest.raises(kserve.WrongAnswerError, match="does not list models"):
            kserve.check_models(200, json.dumps(wrong).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "n"}, "the metadata of m has the name 'n'"),
        ({"inputs": None}, "no list of tensors with name, datatype and shape as inputs"),
        ({"outputs": [{"name": "y", "datatype": "FP32"}]}, "no list of tensors with .* as outputs"),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [-2]}]}, "no list of tensors with .* as outputs"),
    ],
)
def test_wrong_metadata_is_a_failure_that_names_the_fault(change, message):
    assert kserve.check_metadata("m", 200, json.dumps(METADATA).encode()) == METADATA
    with pytest.raises(kserve.WrongAnswerError, match=message):
        kserve.check_metadata("m", 200, json.dumps({**METADATA, **change}).encode())


# --- locust itself


# Locust prints a table of its requests that often, normally every 2 seconds.
CONSOLE = "import locust.stats\nlocust.stats.CONSOLE_STATS_INTERVAL_SEC = 0.5\n"


class Run:
    """A run of locust, which ends by itself or as soon as `until` holds."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        until: Callable[["Run"], object] | None = None,
        files: Sequence[str] = ("locustfile.py",),
    ) -> None:
        self._until = until
        self._began = time.monotonic()
        self._log = directory / f"{len(list(directory.iterdir()))}.log"
        (directory / "console.py").write_text(CONSOLE)
        paths = ",".join(map(str, [*(LOCUST / name for name in files), directory / "console.py"]))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "locust", "-f", paths, *arguments],
                env=environment(directory),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _is_done(self) -> object:
        assert self.process.poll() is None, self.output
        return self._until(self)

    def finish(self) -> "Run":
        """Wait for the end, and kill the run after a timeout."""
        try:
            if self._until:
                wait_for(self._is_done, lambda: self.output)
                self.process.terminate()
            self.status = self.process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.seconds = time.monotonic() - self._began
        return self

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def requests(self) -> dict[str, int]:
        """Numbers of requests by name, in the tables printed so far."""
        rows = re.findall(r"(?m)^\w* +(.+?) +(\d+) +\d+\(.+%\)", self.output)
        return {name: int(count) for name, count in rows if int(count)}

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Names and messages of failed requests; complete at the end."""
        return re.findall(r"(?m)^\d+ +\w+ (.+?): (.+?) *$", self.output)


def headless(directory: Path, *arguments: str, until: Iterable[str] = (), **options: Any) -> Run:
    """Start a run without the web page; it ends by itself, or after requests of all the given names."""
    names = set(until)
    return Run(
        directory, "--headless", *arguments, until=names and (lambda run: names <= run.requests.keys()), **options
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Service]:
    """The demo's model, pictures in both layouts, all datatypes, strings, and a model that takes 50 to 100 ms."""
    directory = tmp_path_factory.mktemp("models")
    saved = {
        "bgr": model_zoo.passthrough(picture=(Type.u8, (2, 12, 16, 3))),
        "nchw": model_zoo.relu((1, 3, 4, 4)),  # only its layout says that it takes no pictures as they are
        "types": model_zoo.passthrough(**{name: (kind, (-1, 2)) for name, kind in ELEMENT_TYPES.items()}),
        SIMPLE: model_zoo.strings(),
        "rows": model_zoo.matrix(),
        "scalar": model_zoo.relu(()),
        "counting": slow_models.counting(),
    }
    for name, model in saved.items():
        model_zoo.save(model, directory / name)
    demo = {"name": "digits", "base_path": str(ROOT / "ovms_rest" / "demo" / "digits")}
    layouts = {"bgr": {"layout": "NHWC"}, "nchw": {"layout": "NCHW"}}
    config = write_config(
        directory, demo, *({"name": name, "base_path": name, **layouts.get(name, {})} for name in saved)
    )
    with serve(directory, "-w", "2", config=config) as running:
        yield running


def _host(port: int) -> list[str]:
    return ["--host", f"http://127.0.0.1:{port}"]


def test_requests_of_all_kinds_to_all_models_succeed(models, tmp_path):
    names = ["digits", "bgr", "nchw", "types", SIMPLE, "rows", "scalar", "counting"]
    labels = {"digits image", "bgr image", *(f"{name} {kind}" for name in names for kind in ("json", "binary"))}
    run = headless(tmp_path, *_host(models.port), "-u", "4", "-r", "4", "--dynamic-dim", "3", until=labels).finish()
    assert (run.status, run.failures) == (0, []), run.output
    assert {name for name in run.requests if not name.startswith("/")} == {*labels, "Aggregated"}


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves models of one float, each of which gets wrong what its name says."""

    protocol_version = "HTTP/1.1"
    wrong = ("shape", "status", "datatype", "binary size", "nothing")
    keys: ClassVar[set[str | None]] = set()  # API keys of inferences

    def do_GET(self) -> None:
        """Send the list of models or the metadata of one."""
        name = urllib.request.unquote(self.path.removeprefix("/v2/models").strip("/"))
        tensor = {"datatype": "FP32", "shape": [-1]}
        listed = [{"name": name, "versions": [{"state": "AVAILABLE"}]} for name in self.wrong]
        described = {"name": name, "inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
        if name.endswith("/config"):
            return self._send(404, {"error": "no configuration"})
        return self._send(200, described if name else {"models": listed})

    def do_POST(self) -> None:
        name = urllib.request.unquote(self.path.split("/")[3])
        self.keys.add(self.headers["X-API-Key"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = body[: int(self.headers.get("Inference-Header-Content-Length", len(body)))]
        output = {"name": "y", "datatype": "FP32", "shape": [1], "data": [0.5]}
        response = {"model_name": name, "id": json.loads(head)["id"], "outputs": [output]}
        if name == "status":
            return self._send(500, {"error": "the model failed"})
        if name == "nothing":
            self.close_connection = True
            return None
        if name == "shape":
            output.update(shape=[1, 1])
        if name == "datatype":
            output["datatype"] = "FP64"
        if name == "binary size":
            del output["data"]
            output["parameters"] = {"binary_data_size": 4}
            return self._send(200, response, b"\0\0")
        return self._send(200, response)

    def _send(self, status: int, content: object, binary: bytes | None = None) -> None:
        head = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(head) + len(binary or b"")))
        if binary is not None:
            self.send_header("Inference-Header-Content-Length", str(len(head)))
        self.end_headers()
        self.wfile.write(head + (binary or b""))

    def log_message(self, *_: object) -> None:
        """Discard the message."""


@contextlib.contextmanager
def _faulty_server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


STEPS_FILES = ("locustfile.py", "steps.py")
STEPS = ("--step-seconds", "1", "--settle-seconds", "0", "--step-factor", "40")
KEY = ("--header", "X-API-Key: secret")
CHOSEN = ("--models", "bgr", "--json-weight", "0", "--binary-weight", "0", "--rate-per-user", "5")
IMPOSSIBLE = {
    "no model has the input imag": ("requests", "--shapes", "imag=1,8,8,1"),
    "status 404: ": ("/v2/models/missing", "--models", "missing"),
    "p99 is ": ("digits json", "--models", "digits", "--max-p99-ms", "0.001", "--rate-per-user", "9"),
}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, Run]:
    """Runs that do not disturb each other, all together."""
    directory = tmp_path_factory.mktemp("runs")
    port = str(free_port())
    two = ("--processes", "2", "--master-bind-port", port, "--master-port", port, "--models", "scalar")
    bounded = ("--latency-limit-ms", "30000", "--first-users", "2", "--max-users", "2", "--rate-per-user", "50")
    slow = ("-u", "4", "-r", "4", "--rate-per-user", "30", *KEY)
    host = _host(models.port)
    with _faulty_server() as faulty_port:
        faulty = _host(faulty_port)
        all_wrong = [f"{name} {kind}" for name in Faulty.wrong for kind in ("json", "binary")]
        runs = {
            "two processes": headless(directory, *host, *two, *STEPS, *bounded, files=STEPS_FILES),
            "wrong": headless(directory, *faulty, *slow, until=all_wrong),
            "allowed": headless(
                directory, *faulty, *slow, "--models", "shape", "--max-fail-ratio", "1", until=["shape json"]
            ),
            "chosen": headless(directory, *host, *_own_pictures(directory), *CHOSEN, until=["bgr image"]),
            **{
                message: headless(directory, *host, *arguments, until=[name])
                for message, (name, *arguments) in IMPOSSIBLE.items()
            },
        }
        return {name: run.finish() for name, run in runs.items()}


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_wrk_sends_the_requests_of_the_users(models, tmp_path):
    host = f"http://127.0.0.1:{models.port}"
    made = [sys.executable, str(LOCUST / "wrk_script.py"), "--host", host, "bgr", "image"]
    (tmp_path / "wrk.lua").write_bytes(subprocess.run(made, capture_output=True, check=True).stdout)
    wrk = ["wrk", "-t", "1", "-c", "1", "-d", "1s", "-s", str(tmp_path / "wrk.lua"), host]
    printed = subprocess.run(wrk, capture_output=True, check=True, text=True, timeout=PATIENCE).stdout
    assert re.search(r"(?m)^ *[1-9]\d* requests in", printed)
    assert "Non-2xx" not in printed  # wrk prints it only when there are some


def _own_pictures(directory: Path) -> tuple[str, str]:
    """Write a picture that the model must resize; return the arguments to send it."""
    assert cv2.imwrite(str(directory / "own.jpg"), np.zeros((30, 50, 3), np.uint8))
    return "--pictures", str(directory / "*.jpg")


def test_arguments_set_models_kinds_pictures_and_rate(runs):
    run = runs["chosen"]
    assert (run.status, run.failures) == (0, []), run.output
    assert set(run.requests) == {"/v2/models/bgr", "/v2/models/bgr/config", "bgr image", "Aggregated"}
    assert run.requests["bgr image"] <= 1 + 5 * run.seconds


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_run_exits_with_status_1(runs, message):
    assert runs[message].status == 1, runs[message].output
    assert message in runs[message].output


def test_wrong_responses_are_failures_with_messages_and_status_1(runs):
    run = runs["wrong"]
    assert run.status == 1, run.output
    messages = {name.rpartition(" ")[0]: error for name, error in run.failures if name.endswith(" binary")}
    assert set(messages) == set(Faulty.wrong)
    assert "output y has shape [1, 1], the metadata [-1]" in messages["shape"]
    assert "status 500: the model failed" in messages["status"]
    assert "output y has datatype FP64, the metadata FP32" in messages["datatype"]
    assert "output y has an invalid binary_data_size" in messages["binary size"]
    assert "more than 0.00%" in run.output
    assert Faulty.keys == {"secret"}


def test_failures_within_the_allowed_ratio_exit_with_status_0(runs):
    run = runs["allowed"]
    assert run.failures
    assert run.status == 0, run.output


def test_steps_end_at_the_latency_limit_and_print_the_highest_rate(models, tmp_path):
    # With two workers and inferences of 50 to 100 ms, the last of 40 users waits for more than a second.
    slow = ("--models", "counting", "--integers", f"{slow_models.SLOW}:{slow_models.SLOW}", "--image-weight", "0")
    limit = ("--latency-limit-ms", "900")
    line = r"(?m)^highest rate with p99 <= 900 ms: (\d+\.\d) requests/s \(1 user, p99 (\d+\.\d) ms\)$"

    def run_steps(seconds):
        steps = (*STEPS, "--step-seconds", str(seconds))
        return headless(tmp_path, *_host(models.port), *slow, *steps, *limit, files=STEPS_FILES).finish()

    # The machine may pause for a whole short step.
    _, run = keep_trying(run_steps, lambda run: re.search(line, run.output), seconds=(1, 5, 25))
    assert run.status == 0, run.output
    assert re.search(r"(?m)^step 1: 1 user, \d+\.\d requests/s, p99 \d+\.\d ms, 0 failed, 0 refused", run.output)
    assert re.search(r"(?m)^step 2: 40 users, ", run.output)
    best = re.search(line, run.output)
    assert best, run.output
    assert float(best[1]) >= 1
    assert float(best[2]) <= 900


def test_steps_over_two_processes_count_the_requests_of_both(runs):
    run = runs["two processes"]
    assert run.status == 0, run.output
    assert re.search(r"(?m)^step 1: 2 users, .*, 0 failed, 0 refused, sent by 2 processes$", run.output), run.output
    assert re.search(r"(?m)^the limit was not reached with 2 users; --max-users allows more$", run.output)
    assert re.search(r"(?m)^highest rate with p99 <= 30000 ms: \d+\.\d requests/s \(2 users, ", run.output)


def test_web_page_shows_the_run(models, tmp_path):
    port = free_port()
    web = ("--autostart", "--web-host", "127.0.0.1", "--web-port", str(port), "-u", "2", "--models", "digits")
    pages = []

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as response:
            return response.read().decode()

    def has_requests(_: Run) -> list[str]:
        with contextlib.suppress(urllib.error.URLError):
            stats = json.loads(get("/stats/requests"))["stats"]
            if any(entry["name"] == "digits image" and entry["num_requests"] for entry in stats):
                pages.append(get("/"))
        return pages

    run = Run(tmp_path, *_host(models.port), *web, until=has_requests).finish()
    assert run.status == 0, run.output
    assert "<title>Locust</title>" in pages[0]
    assert "image_weight" in pages[0]  # the page can change the arguments
