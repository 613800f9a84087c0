"""The body of a request: received and decompressed within its limit, aligned for OpenVINO."""

import gzip
import io
import tracemalloc
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from costs import measure_cost
from fake_app import infer, make

from ovms_rest.errors import BodyTooLargeError, InvalidRequestError, UnsupportedEncodingError
from ovms_rest.protocol.header_length import read_header_length
from ovms_rest.resources.body import read_body

DATA = b'{"inputs": []}' + bytes(range(256))


def known(body, **environ):
    """Make the environ of a request with Content-Length."""
    return {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body), **environ}


def chunked(body, **environ):
    """Make the environ of a chunked request, whose chunks the server has decoded."""
    return {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": io.BytesIO(body), **environ}


def read(environ, limit=1000, header_length=None):
    return read_body(environ, limit, read_header_length(header_length).length)


def refusal(error, environ, limit=1000):
    """Return the message of the error for a body."""
    with pytest.raises(error) as caught:
        read(environ, limit)
    return str(caught.value)


def address(buffer):
    return np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]


def gzipped(data):
    """Compress without the time of day, which would be in the names of the tests."""
    return gzip.compress(data, mtime=0)


def raw_deflate(data):
    """Compress without zlib's container, as some clients understand deflate."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


kinds = pytest.mark.parametrize("kind", [known, chunked])
compressions = pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzipped), ("deflate", zlib.compress)])


# --- read_body: receiving


class Trickle(io.BytesIO):
    def read(self, size):
        return super().read(min(size, 3))


def test_body_in_pieces_is_received_completely():
    assert read(known(DATA) | {"wsgi.input": Trickle(DATA)}) == DATA


def test_body_of_more_than_a_mebibyte_is_received_completely():
    body = bytes(range(256)) * 10_000
    assert read(known(body), limit=len(body)) == body


def test_bytes_after_the_body_stay_in_the_stream():
    stream = io.BytesIO(b"bodynext request")
    assert read({"CONTENT_LENGTH": "4", "wsgi.input": stream}) == b"body"
    assert stream.read() == b"next request"


# --- read_body: the received bytes


@kinds
@pytest.mark.parametrize("body", [b"", b"x", pytest.param(DATA, id="DATA")])
def test_body_is_returned_unchanged(kind, body):
    assert read(kind(body)) == body


@pytest.mark.parametrize("environ", [{}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}])
def test_request_without_body_reads_nothing(environ):
    assert read({"wsgi.input": io.BytesIO(b"of the next request"), **environ}) == b""


@kinds
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("offset", [0, 1, 77, 128, 200])
def test_tensors_are_aligned_to_64_bytes_and_writable(kind, encoding, offset):
    body = {None: bytes, "gzip": gzipped, "deflate": zlib.compress}[encoding](DATA)
    environ = kind(body) | ({"HTTP_CONTENT_ENCODING": encoding} if encoding else {})
    buffer = read(environ, header_length=str(offset))
    assert (buffer == DATA, buffer.readonly, (address(buffer) + offset) % 64) == (True, False, 0)


@kinds
@pytest.mark.parametrize(
    "header_length", [None, "", "0", "abc", "-1", "5,5", "1.5", " 5", "²", "٣", "9" * 11, "9" * 12, "9" * 5000]
)
def test_invalid_header_length_is_ignored(kind, header_length):
    """The decoder reports it."""
    assert read(kind(DATA), header_length=header_length) == DATA


class Whole:
    """The stream of a server that holds the whole body in memory, as our own worker does."""

    def __init__(self, body):
        self.buffer = memoryview(bytearray(body))


def test_body_in_memory_is_not_copied():
    stream = Whole(DATA)
    assert read({"CONTENT_LENGTH": str(len(DATA)), "wsgi.input": stream}) is stream.buffer


def test_compressed_body_in_memory_is_decompressed():
    assert read({"wsgi.input": Whole(gzipped(DATA)), "HTTP_CONTENT_ENCODING": "gzip"}) == DATA


# --- read_body: incomplete bodies


@pytest.mark.parametrize(("came", "length"), [(b"", 1), (b"abc", 5), (b"x" * 99, 100)])
def test_body_that_ends_early_is_an_error(came, length):
    message = refusal(InvalidRequestError, {"CONTENT_LENGTH": str(length), "wsgi.input": io.BytesIO(came)})
    assert message == f"the body ended after {len(came)} of {length} bytes"


class Broken(io.BytesIO):
    """A stream that fails at its end."""

    def read(self, size):
        if data := super().read(size):
            return data
        raise OSError("Invalid chunk size: b'x'")


@pytest.mark.parametrize("environ", [{"CONTENT_LENGTH": "5"}, {"HTTP_TRANSFER_ENCODING": "chunked"}])
def test_error_of_the_stream_is_reported(environ):
    message = refusal(InvalidRequestError, environ | {"wsgi.input": Broken(b"abc")})
    assert message == "the body could not be received: Invalid chunk size: b'x'"


# --- read_body: the limit


@kinds
def test_body_may_be_as_large_as_the_limit(kind):
    assert len(read(kind(DATA), limit=len(DATA))) == len(DATA)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (known(DATA), "the body has 270 bytes, at most 269 are allowed"),
        (chunked(DATA), "the body has more than the 269 bytes allowed"),
    ],
)
def test_body_over_the_limit_is_refused(environ, message):
    assert refusal(BodyTooLargeError, environ, limit=269) == message


def test_body_announced_over_the_limit_is_not_read():
    environ = known(DATA)
    with pytest.raises(BodyTooLargeError):
        read(environ, limit=10)
    assert environ["wsgi.input"].tell() == 0


def test_huge_announced_body_is_refused_without_allocation():
    with pytest.raises(BodyTooLargeError):
        read({"CONTENT_LENGTH": str(10**30), "wsgi.input": io.BytesIO()})


class Endless:
    given = 0

    def read(self, size):
        self.given += size
        return bytes(size)


def test_chunked_body_is_not_read_far_beyond_the_limit():
    stream = Endless()
    with pytest.raises(BodyTooLargeError):
        read({"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": stream})
    assert stream.given <= 2**20


@compressions
def test_body_may_decompress_to_the_limit(encoding, compress):
    data = bytes(5000)
    assert read(known(compress(data), HTTP_CONTENT_ENCODING=encoding), limit=5000) == data


@kinds
@compressions
def test_body_that_decompresses_beyond_the_limit_is_refused(kind, encoding, compress):
    message = refusal(BodyTooLargeError, kind(compress(bytes(5001)), HTTP_CONTENT_ENCODING=encoding), limit=5000)
    assert message == "the body decompresses to more than the 5000 bytes allowed"


@compressions
def test_compressed_body_over_the_limit_is_refused(encoding, compress):
    body = compress(np.random.default_rng(0).bytes(200))
    message = refusal(BodyTooLargeError, known(body, HTTP_CONTENT_ENCODING=encoding), limit=100)
    assert message == f"the body has {len(body)} bytes, at most 100 are allowed"


@compressions
def test_decompression_bomb_is_not_inflated_beyond_the_limit(encoding, compress):
    bomb = compress(bytes(64 * 2**20))
    limit = 2**20
    assert len(bomb) < limit
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLargeError):
            read(known(bomb, HTTP_CONTENT_ENCODING=encoding), limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * limit


# --- read_body: Content-Encoding


@kinds
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        *(("gzip", gzipped), ("GZIP", gzipped), (" Gzip ", gzipped)),
        *(("deflate", zlib.compress), ("Deflate", zlib.compress)),
        *(("identity", bytes), ("Identity", bytes), ("", bytes)),
    ],
)
def test_encoded_body_is_decoded(kind, encoding, compress):
    assert read(kind(compress(DATA), HTTP_CONTENT_ENCODING=encoding)) == DATA


@compressions
def test_body_may_decompress_to_nothing(encoding, compress):
    assert read(known(compress(b""), HTTP_CONTENT_ENCODING=encoding)) == b""


@pytest.mark.parametrize(
    "encoding",
    [
        *("br", "zstd", "compress", "BR", "gzip, deflate", "gzip,gzip", "identity, gzip", "identity,identity"),
        *("gzip;q=1", "*", ","),
    ],
)
def test_unsupported_encodings_and_lists_are_refused(encoding):
    message = refusal(UnsupportedEncodingError, known(gzipped(DATA), HTTP_CONTENT_ENCODING=encoding))
    assert message == f"unsupported Content-Encoding {encoding.lower()!r}; supported: gzip, deflate, identity"


def test_long_encoding_is_cut_in_the_message():
    message = refusal(UnsupportedEncodingError, known(gzipped(DATA), HTTP_CONTENT_ENCODING="x" * 8000))
    assert message == f"unsupported Content-Encoding '{'x' * 60}...'; supported: gzip, deflate, identity"


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        pytest.param("gzip", DATA, id="gzip: not compressed"),
        pytest.param("gzip", zlib.compress(DATA), id="gzip: zlib's container"),
        pytest.param("gzip", b"\x1f\x8b\x08" + bytes(50), id="gzip: an empty head"),
        pytest.param("gzip", gzipped(DATA)[:-8] + bytes(8), id="gzip: a wrong checksum"),
        pytest.param("deflate", DATA, id="deflate: not compressed"),
        pytest.param("deflate", gzipped(DATA), id="deflate: gzip's container"),
        pytest.param("deflate", raw_deflate(DATA), id="deflate: no container"),
        pytest.param("deflate", zlib.compress(DATA)[:-4] + bytes(4), id="deflate: a wrong checksum"),
    ],
)
def test_broken_stream_is_an_error(encoding, body):
    with pytest.raises(InvalidRequestError, match=f"the body is not a valid {encoding} stream: "):
        read(known(body, HTTP_CONTENT_ENCODING=encoding))


@compressions
@pytest.mark.parametrize("cut", [1, 5, 50])
def test_stream_that_ends_early_is_an_error(encoding, compress, cut):
    body = compress(DATA)[:-cut]
    message = refusal(InvalidRequestError, known(body, HTTP_CONTENT_ENCODING=encoding))
    assert message == f"the {encoding} stream of the body ends early, after {len(body)} bytes"


@kinds
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_empty_body_is_not_a_compressed_stream(kind, encoding):
    message = refusal(InvalidRequestError, kind(b"", HTTP_CONTENT_ENCODING=encoding))
    assert message == f"the {encoding} stream of the body ends early, after 0 bytes"


@compressions
@pytest.mark.parametrize("further", [b"x", b"\0", b"\x1f\x8b", pytest.param(gzipped(DATA), id="one more")])
def test_bytes_after_the_stream_are_an_error(encoding, compress, further):
    message = refusal(InvalidRequestError, known(compress(DATA) + further, HTTP_CONTENT_ENCODING=encoding))
    size = "1 byte" if len(further) == 1 else f"{len(further)} bytes"
    assert message == f"the body has {size} after the end of its {encoding} stream"


# --- Memory

BOMBS = {
    "a few bytes": "gzip.compress(bytes(2**25))",
    "numbers": "gzip.compress(b'0.123,' * (2**25 // 6), 1)",
    "noise of four bits": "gzip.compress(bytes(byte & 15 for byte in os.urandom(2**20)) * 32, 1)",
    "deflate": "zlib.compress(bytes(2**25))",
}


@pytest.mark.parametrize("compressed", BOMBS.values(), ids=BOMBS)
def test_decompressed_body_is_in_memory_once(compressed):
    encoding = "deflate" if "zlib" in compressed else "gzip"
    prepare = (
        f"import os\nsys.path.append({str(Path(__file__).parent)!r})\nfrom test_body import *\n"
        f"environ = known({compressed}, HTTP_CONTENT_ENCODING={encoding!r}, HTTP_TRANSFER_ENCODING='')\n"
        "environ['wsgi.input'] = types.SimpleNamespace(buffer=memoryview(environ['wsgi.input'].getvalue()))"
    )
    cost = measure_cost(prepare, "data = read(environ, 2**25)")
    assert cost.error == ""
    # deflate does not announce its size, so its buffer grows.
    assert cost.mebibytes < 32 * (1.5 if "zlib" in compressed else 1) + 4


@compressions
@pytest.mark.parametrize("size", [2**17 - 1, 2**17, 2**17 + 1, 2**19, 3_000_000])
@pytest.mark.parametrize("step", [0, 1, 251])
def test_large_bodies_survive_compression(encoding, compress, size, step):
    data = bytes(size) if not step else (bytes(range(0, 251, step)) * size)[:size]
    assert bytes(read(known(compress(data), HTTP_CONTENT_ENCODING=encoding), size)) == data
    message = refusal(BodyTooLargeError, known(compress(data), HTTP_CONTENT_ENCODING=encoding), size - 1)
    assert message == f"the body decompresses to more than the {size - 1} bytes allowed"


@pytest.mark.parametrize("announced", [0, 1, 2**32 - 1])
def test_stream_with_a_wrong_size_is_refused(announced):
    body = gzipped(bytes(2**20))[:-4] + announced.to_bytes(4, "little")
    with pytest.raises(InvalidRequestError, match="the body is not a valid gzip stream: "):
        read(known(body, HTTP_CONTENT_ENCODING="gzip"), 2**21)


def test_all_bytes_after_the_stream_are_counted():
    with pytest.raises(InvalidRequestError, match=r"^the body has 1000000 bytes after the end of its gzip stream$"):
        read(known(gzipped(DATA) + bytes(1_000_000), HTTP_CONTENT_ENCODING="gzip"), 2**21)


def test_route_limit_applies_to_bodies_from_our_worker():
    environ = {"wsgi.input": types.SimpleNamespace(buffer=memoryview(bytes(11)))}
    assert bytes(read_body(environ, 11)) == bytes(11)
    with pytest.raises(BodyTooLargeError, match=r"^the body has 11 bytes, at most 10 are allowed$"):
        read_body(environ, 10)


# --- The limit in the settings

CHUNKED = {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
DEFLATED = {"HTTP_CONTENT_ENCODING": "deflate"}


@pytest.mark.parametrize(
    ("environ", "body", "error"),
    [
        ({}, b"x" * 11, "the body has 11 bytes, at most 10 are allowed"),
        ({"CONTENT_LENGTH": str(10**30)}, b"", f"the body has {10**30} bytes, at most 10 are allowed"),
        (CHUNKED, b"x" * 11, "the body has more than the 10 bytes allowed"),
        (DEFLATED, zlib.compress(b""), "the request has no JSON, expected an object with the key 'inputs'"),
    ],
)
def test_body_limit_is_that_of_the_settings(environ, body, error):
    assert infer(make(max_body_bytes=10), body, **environ).json() == {"error": error}


def test_body_limit_applies_to_the_decompressed_size():
    body = gzip.compress(b" " * 101)
    answer = infer(make(max_body_bytes=100), body, headers={"Content-Encoding": "gzip"})
    assert answer.status == 413
    assert answer.json() == {"error": "the body decompresses to more than the 100 bytes allowed"}
