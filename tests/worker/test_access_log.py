"""The access log: the content and format of lines, and the loss of lines that cannot be written."""

import json
import os
import resource
import select
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms_rest.shared_memory.statistics import InferenceRecord
from ovms_rest.tracing.context import TRACE, TraceContext
from ovms_rest.worker.access_log import ENCODERS, Access, AccessLog, access_of, encode_json, encode_text
from ovms_rest.worker.http1 import RequestBody

INFERRED = Access(
    *("127.0.0.1", "5e1f-1", "POST", "/v2/models/relu/infer", 200, 110, 123, 300, "relu", "1", "mine", 20, 50),
    *("0af7651916cd43dd8448eb211c80319c",),
)
LIVE = Access("127.0.0.1", "5e1f-2", "GET", "/v2/health/live", 200, 0, 0, 30)

# --- Lines


def test_json_line_has_all_keys():
    assert encode_json(INFERRED, 784111777.25) == (
        b'{"time":"1994-11-06T08:49:37.250Z","client":"127.0.0.1","request_id":"5e1f-1","method":"POST",'
        b'"path":"/v2/models/relu/infer","status":200,"bytes_in":110,"bytes_out":123,"total_us":300,'
        b'"model":"relu","version":"1","id":"mine","queue_us":20,"inference_us":50,"trace_id":"0af7651916cd43dd8448eb211c80319c"}\n'
    )
    unknown = ("model", "version", "id", "queue_us", "inference_us", "trace_id")
    assert [key for key, value in json.loads(encode_json(LIVE, 0)).items() if value is None] == list(unknown)


def test_text_line_leaves_out_unknown_values():
    assert encode_text(LIVE, 784111777.0) == (
        b"time=1994-11-06T08:49:37.000Z client=127.0.0.1 request_id=5e1f-2 method=GET path=/v2/health/live status=200 "
        b"bytes_in=0 bytes_out=0 total_us=30\n"
    )
    assert encode_text(INFERRED, 0).endswith(
        b" model=relu version=1 id=mine queue_us=20 inference_us=50 trace_id=0af7651916cd43dd8448eb211c80319c\n"
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a b", rb'"a b"'),
        ("", b'""'),
        ("a=b", b'"a=b"'),
        ('"', rb'"\""'),
        ("a\nstatus=200", rb'"a\nstatus=200"'),
        ("\x1b[2J\x7f\x9b", rb'"\u001b[2J\u007f\u009b"'),
        ("\xe9\u2028", rb'"\u00e9\u2028"'),
    ],
)
def test_ambiguous_values_are_quoted_in_text(value, written):
    assert b" id=" + written + b"\n" in encode_text(Access("", "", "", "", 0, 0, 0, 0, id=value), 0)


def described_as(text):
    """Set every value that a client can choose."""
    return Access(text, text, text, text, 400, 0, 0, 0, "m" * 300, "1", text, 0, 0, text)


@pytest.mark.parametrize("encode", ENCODERS.values())
@given(text=st.text())
def test_every_line_is_one_line_of_printable_ascii(encode, text):
    line = encode(described_as(text), 0)
    assert line[-1:] == b"\n"
    assert line[:-1].isascii()
    assert line[:-1].decode().isprintable()


@given(text=st.text(max_size=128))
def test_json_keeps_values_unchanged(text):
    assert json.loads(encode_json(described_as(text), 0))["id"] == text


@pytest.mark.parametrize("encode", ENCODERS.values())
@pytest.mark.parametrize("character", ["\0", "\xff", '"'])
def test_longest_line_fits_into_one_write(encode, character):
    """Values of a head have one byte per character; a client's own id, in JSON, may have any characters."""
    access = Access(
        "::1", "~" * 128, character * 20, character * 8000, 400, 1, 1, 1, "m" * 300, "1", "\U0001f600" * 8000
    )
    access = replace(access, queue_us=10**9, inference_us=10**9, trace_id="0" * 32)
    assert len(encode(access, 0)) <= select.PIPE_BUF


# --- Access


def environ_of(**more):
    return {
        "REMOTE_ADDR": "::1",
        "HTTP_X_REQUEST_ID": "abc",
        "REQUEST_METHOD": "POST",
        "RAW_URI": "/v2/models/m%20n/infer?token=secret",
        **more,
    }


def test_access_has_the_record_of_the_inference():
    record = InferenceRecord(0, "m n", "3", "mine", 2_000, 1_000, 70_999, 1_000)
    body = RequestBody(memoryview(b"12345"))
    environ = environ_of(**{"wsgi.input": body, "ovms_rest.inference": record})
    access = access_of(environ, "200 OK", 7, 0)
    assert access.total_us > 0
    assert access == Access(
        "::1", "abc", "POST", "/v2/models/m%20n/infer", 200, 5, 7, access.total_us, "m n", "3", "mine", 2, 70
    )


def test_access_has_the_trace_of_the_headers_or_of_the_request():
    trace_id, other = "0af7651916cd43dd8448eb211c80319c", "1" * 32
    environ = environ_of(HTTP_TRACEPARENT=f"00-{trace_id}-b7ad6b7169203331-01")
    assert access_of(environ, "413 Content Too Large", 7, 0).trace_id == trace_id
    environ[TRACE] = TraceContext(other, "2" * 16, 1)
    assert access_of(environ, "200 OK", 7, 0).trace_id == other
    assert access_of(environ_of(HTTP_TRACEPARENT=f"ff-{trace_id}-b7ad6b7169203331-01"), "200 OK", 7, 0).trace_id is None


def test_access_of_an_unread_request_has_unknown_values():
    access = access_of(environ_of(), "413 Content Too Large", 7, 10**18)
    assert (access.status, access.bytes_in, access.model, access.id) == (413, None, None, None)


def test_empty_id_is_unknown():
    record = InferenceRecord(0, "m", "3")
    assert access_of(environ_of(**{"ovms_rest.inference": record}), "200 OK", 7, 0).id is None


def test_inference_that_was_not_started_has_no_model():
    access = access_of(environ_of(**{"ovms_rest.inference": InferenceRecord(0)}), "503 Service Unavailable", 7, 0)
    assert (access.model, access.version, access.queue_us) == (None, None, None)


# --- Files


def test_lines_are_appended_to_the_file(tmp_path, caplog):
    path = tmp_path / "access"
    path.write_text("before\n")
    log, other = AccessLog("text", str(path)), AccessLog("json", str(path))
    log.write(LIVE)
    other.write(LIVE)
    log.write(LIVE)
    before, *lines = path.read_text().splitlines()
    assert (before, [line[:1] for line in lines]) == ("before", ["t", "{", "t"])
    assert caplog.messages == []


def test_moved_file_is_created_again_by_reopen(tmp_path):
    path, moved = tmp_path / "access", tmp_path / "access.1"
    log = AccessLog("json", str(path))
    log.write(LIVE)
    path.rename(moved)
    log.write(LIVE)
    assert not path.exists()
    log.reopen()
    log.write(INFERRED)
    assert moved.read_text().count("\n") == 2
    assert json.loads(path.read_text())["model"] == "relu"


def test_file_that_cannot_be_reopened_stays_in_use(tmp_path, caplog):
    directory = tmp_path / "logs"
    directory.mkdir()
    log = AccessLog("json", str(directory / "access"))
    directory.rename(tmp_path / "moved")
    log.reopen()
    log.write(LIVE)
    assert (tmp_path / "moved" / "access").read_text().count("\n") == 1
    assert caplog.messages == [f"cannot open the access log {directory / 'access'}: No such file or directory"]


def test_file_that_cannot_be_opened_is_logged_and_may_be_opened_later(tmp_path, caplog):
    path = tmp_path / "logs" / "access"
    log = AccessLog("json", str(path))
    log.write(LIVE)
    assert caplog.messages == [f"cannot open the access log {path}: No such file or directory"]
    path.parent.mkdir()
    log.reopen()
    log.write(LIVE)
    assert path.read_text().count("\n") == 1


def test_full_disk_loses_lines_and_is_logged_once(caplog):
    log = AccessLog("json", "/dev/full")
    for _ in range(3):
        log.write(LIVE)
    assert caplog.messages == ["lines of the access log /dev/full are lost: No space left on device"]


@pytest.fixture
def pipe(tmp_path):
    """A named pipe with a non-blocking reader."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield str(path), reader
    os.close(reader)


def test_lines_without_a_reader_are_lost_until_there_is_another(pipe, caplog):
    path, reader = pipe
    log = AccessLog("json", path)
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(other, reader)
    log.write(LIVE)
    log.write(LIVE)
    assert caplog.messages == [f"lines of the access log {path} are lost: Broken pipe"]
    again = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log.write(LIVE)
    assert json.loads(os.read(again, 65536))["path"] == "/v2/health/live"
    os.close(again)
    os.close(other)


def test_writer_does_not_wait_for_a_reader_that_has_fallen_behind(pipe, caplog):
    path, reader = pipe
    log = AccessLog("json", path)
    for _ in range(1000):
        log.write(LIVE)
    assert caplog.messages == [f"lines of the access log {path} are lost: its reader has fallen behind"]
    lines = os.read(reader, 2**20).splitlines()
    assert 100 < len(lines) < 1000
    assert all(json.loads(line)["status"] == 200 for line in lines)
    log.write(LIVE)
    assert os.read(reader, 2**20).count(b"\n") == 1


def test_writer_does_not_wait_for_a_blocked_standard_output(caplog):
    """It is shared with other processes, so its flags stay unchanged."""
    reader, writer = os.pipe()
    kept = os.dup(1)
    os.dup2(writer, 1)
    try:
        log = AccessLog("text", "-")
        log.reopen()
        for _ in range(1000):
            log.write(LIVE)
        assert os.get_blocking(1)
    finally:
        os.dup2(kept, 1)
    assert caplog.messages == ["lines of the access log - are lost: its reader has fallen behind"]
    assert os.read(reader, 100).startswith(b"time=")
    for file in (reader, writer, kept):
        os.close(file)


def test_truncated_line_does_not_spoil_the_next(tmp_path, caplog):
    """A disk that becomes full takes a part of the last line, as a file size limit does here."""
    path = tmp_path / "access"
    log = AccessLog("json", str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        log.write(LIVE)
        log.write(LIVE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(LIVE)
    log.write(LIVE)
    assert [len(line) > 100 for line in path.read_text().splitlines()] == [False, True, True]
    assert caplog.messages == [f"lines of the access log {path} are lost: File too large"]


def test_lines_of_several_writers_do_not_mix(tmp_path):
    path = tmp_path / "access"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_many, [str(path)] * 4))
    lines = path.read_text().splitlines()
    assert len(lines) == 400
    assert all(json.loads(line)["status"] == 200 for line in lines)


def write_many(path):
    log = AccessLog("json", path)
    for _ in range(100):
        log.write(INFERRED)
