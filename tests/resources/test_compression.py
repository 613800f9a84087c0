"""Compression of responses: the choice of an encoding, and the compressed stream."""

import gzip
import zlib

import numpy as np
import pytest
from fake_app import BINARY, infer, make, request

from ovms_rest.resources.compression import choose_encoding, compress


@pytest.mark.parametrize(
    ("accept_encoding", "encoding"),
    [
        # named encodings
        *(("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate", "gzip"), ("deflate, gzip", "gzip")),
        *(("gzip,deflate,br,zstd", "gzip"), ("br, deflate", "deflate")),
        *((other, None) for other in ("", "br", "x-gzip", "gzipped")),
        # weights
        *(("gzip;q=0.5, deflate;q=0.6", "deflate"), ("gzip;q=0.6, deflate;q=0.5", "gzip")),
        *(("gzip;q=0.5, deflate", "deflate"), ("gzip;q=0.5, deflate;q=0.5", "gzip")),
        *(("gzip;q=0.001", "gzip"), ("gzip;q=1.000", "gzip"), ("gzip;q=1.", "gzip")),
        ("br;q=1, deflate;q=0.2, gzip;q=0.1", "deflate"),
        # 0 refuses an encoding
        *(("gzip;q=0", None), ("gzip;q=0.000", None), ("gzip;q=0, deflate;q=0", None)),
        *(("gzip;q=0, deflate", "deflate"), ("gzip;q=0, deflate;q=0.001", "deflate")),
        # identity when preferred
        *(("identity", None), ("identity;q=0", None), ("identity, gzip;q=0.5", None), ("gzip, identity;q=0", "gzip")),
        *(("gzip;q=0.5, identity;q=0.5", "gzip"), ("gzip;q=0.5, identity;q=0.4", "gzip")),
        ("gzip;q=0.5, deflate;q=0.4, identity;q=0.6", None),
        # * does not ask for compression
        *(("*", None), ("*;q=1", None), ("gzip;q=0, *", None)),
        *(("deflate, *;q=0.5", "deflate"), ("gzip, *;q=0", "gzip")),
        # upper case, spaces and empty elements
        *(("GZIP", "gzip"), ("Deflate;Q=0.5", "deflate"), ("  gzip  ", "gzip"), (",,gzip,", "gzip"), (",", None)),
        *(("gzip ; q=0.5 , deflate ;q=0.6", "deflate"), ("gzip;\tq=0.5,\tdeflate", "deflate")),
    ],
)
def test_encoding_is_chosen_by_weight(accept_encoding, encoding):
    assert choose_encoding(accept_encoding) == encoding


@pytest.mark.parametrize(
    "item",
    [
        *("gzip;q=", "gzip;q=abc", "gzip;q=-1", "gzip;q=0.5;x=1", "gzip gzip", "q=1", ";", ";q=1"),
        *("gzip;q=nan", "gzip;q=inf", "gzip;q=2", "gzip;q=1e-1", "gzip;q=0_1", "gzip;level=9"),
    ],
)
@pytest.mark.parametrize(("others", "encoding"), [("", None), (", deflate;q=0.1", "deflate")])
def test_malformed_items_are_ignored(item, others, encoding):
    """RFC 9110, 12.4.2: a weight is 0 or 1, with up to three decimals; a coding has no other parameter."""
    assert choose_encoding(item + others) == encoding


@pytest.mark.parametrize(
    "buffers",
    [
        [],
        [b""],
        [b"head"],
        [b"head", memoryview(b"tensor")],
        [b"head", np.arange(1000, dtype=np.float32).view(np.uint8).data, memoryview(b""), b"tail"],
        [bytes(300_000), np.random.default_rng(0).bytes(300_000)],
    ],
)
@pytest.mark.parametrize(("encoding", "decompress"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_buffers_are_compressed_as_one_stream(encoding, decompress, buffers):
    assert decompress(compress(buffers, encoding)) == b"".join(buffers)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_numbers_as_text_shrink_to_less_than_half(encoding):
    text = b",".join(b"%.8f" % value for value in np.random.default_rng(0).random(5000))
    assert len(compress([text], encoding)) < len(text) / 2


# --- Responses


def test_compression_is_off_by_default():
    answer = infer(make(), request(1), headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    assert answer.json()["model_name"] == "m"


@pytest.mark.parametrize(("encoding", "decompress"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
@pytest.mark.parametrize("keys", [{}, BINARY])
def test_response_is_compressed_if_enabled_and_requested(encoding, decompress, keys):
    plain = infer(make(), request(*range(100), **keys))
    answer = infer(make(response_compression=True), request(*range(100), **keys), headers={"Accept-Encoding": encoding})
    assert (answer.status, decompress(answer.body)) == (200, plain.body)
    assert answer.headers == plain.headers | {
        "content-encoding": encoding,
        "content-length": str(len(answer.body)),
        "vary": "Accept-Encoding",
    }


@pytest.mark.parametrize(
    "headers", [{}, *({"Accept-Encoding": value} for value in ("", "identity", "br", "*", "gzip;q=0"))]
)
def test_response_is_not_compressed_unless_requested(headers):
    answer = infer(make(response_compression=True), request(1), headers=headers)
    assert "content-encoding" not in answer.headers
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.json()["model_name"] == "m"
