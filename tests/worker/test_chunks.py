"""The decoder of chunked bodies: linear time, little work per call, and limits."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_http import RELU, chunk
from request_cases import BARE_CR_OR_LF, END, REFUSED_CHUNKS, REFUSED_TRAILERS, SIZE, VALID_CHUNKS

from ovms_rest.protocol.words import count_of
from ovms_rest.worker.chunks import CHUNKS_PER_CALL, ChunkDecoder
from ovms_rest.worker.http1 import Limits, Refusal

LIMITS = Limits(8190, 100, 8190)
MIB = 2**20


def decode(data, pieces=(), max_body=64 * MIB, aligned=0):
    """Decode data cut into pieces; return the decoder, and the size of the body after every call."""
    decoder, sizes = ChunkDecoder(LIMITS, max_body, aligned), []
    places = [0, *sorted(pieces), len(data)]
    for start, end in itertools.pairwise(places):
        if decoder.is_complete:
            decoder.rest += data[start:end]
            continue
        decoder.feed(data[start:end])
        sizes.append(decoder.size)
        while decoder.has_more:
            decoder.feed(b"")
            sizes.append(decoder.size)
    return decoder, sizes


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.sampled_from([b"", b";a", b"; b=c"])), max_size=40),
    st.lists(st.integers(0, 3000), max_size=20),
    st.binary(max_size=20),
)
def test_body_in_any_pieces_is_the_same(chunks, pieces, behind):
    data = b"".join(chunk(body, extension) for body, extension in chunks) + b"0\r\n\r\n" + behind
    decoder, _ = decode(data, [min(piece, len(data)) for piece in pieces])
    assert decoder.is_complete
    assert bytes(decoder.data) == b"".join(body for body, _ in chunks)
    assert decoder.rest == behind


@pytest.mark.parametrize("size", [1, 15, 16, 255, 256, 70_000])
@pytest.mark.parametrize("form", ["%x", "%X", "0%x"])
def test_chunks_of_every_size_are_decoded(size, form):
    body = random.Random(size).randbytes(size)
    data = (form.encode() % size + b"\r\n" + body + b"\r\n") * 30 + b"0\r\n\r\n"
    decoder, _ = decode(data)
    assert bytes(decoder.data) == body * 30


@pytest.mark.parametrize("data", VALID_CHUNKS)
def test_chunks_of_every_form_are_decoded(data):
    decoder, _ = decode(data + b"GET")
    assert (decoder.is_complete, bytes(decoder.data), decoder.rest) == (True, RELU, b"GET")


@pytest.mark.parametrize("data", REFUSED_CHUNKS)
def test_malformed_chunks_are_refused(data):
    with pytest.raises(Refusal) as caught:
        decode(data + b"GET / HTTP/1.1\r\n\r\n")
    assert caught.value.status in (400, 431)


@pytest.mark.parametrize("data", BARE_CR_OR_LF)
def test_chunk_line_with_a_bare_cr_or_lf_is_refused_immediately(data):
    with pytest.raises(Refusal) as caught:
        decode(data)
    assert caught.value.status == 400


@pytest.mark.parametrize("trailer", REFUSED_TRAILERS)
def test_malformed_trailers_are_refused(trailer):
    with pytest.raises(Refusal) as caught:
        decode(SIZE + b"\r\n" + RELU + END[:-2] + trailer + b"\r\n\r\n")
    assert caught.value.status == 400


@pytest.mark.parametrize("extension", [b"", b";a"])
def test_one_call_decodes_a_limited_number_of_tiny_chunks(extension):
    """A connection that sends them must not delay others."""
    count = 20_000
    decoder, sizes = decode(chunk(b"x", extension) * count + chunk(b""))
    assert (decoder.is_complete, decoder.size) == (True, count)
    assert max(after - before for before, after in zip([0, *sizes], sizes, strict=False)) <= CHUNKS_PER_CALL


def test_body_may_end_at_the_limit_of_a_call():
    for count in range(CHUNKS_PER_CALL - 20, CHUNKS_PER_CALL + 20):
        decoder, _ = decode(chunk(b"x") * count + chunk(b"") + b"GET")
        assert (decoder.is_complete, decoder.size, decoder.rest) == (True, count, b"GET")


@pytest.mark.parametrize(
    ("before", "size"), [(0, MIB + 1), (0, 2**59), (1, MIB), (100, MIB - 99), (300_000, MIB), (MIB, 1), (60, 2**40)]
)
def test_oversized_chunk_is_refused_at_its_size_line(before, size):
    decoder = ChunkDecoder(LIMITS, MIB)
    if before:
        decoder.feed(chunk(b"x" * before))
    with pytest.raises(Refusal) as caught:
        decoder.feed(b"%x\r\n" % size)
    message = f"the body is too large: a chunk of {size} after {count_of(before, 'byte')}, at most {MIB} are allowed"
    assert (caught.value.status, str(caught.value)) == (413, message)


def test_small_chunks_are_refused_at_the_limit_of_the_body():
    with pytest.raises(Refusal, match="a chunk of 1 after 100 bytes"):
        decode(chunk(b"x") * 101, max_body=100)
    assert decode(chunk(b"x") * 100 + chunk(b""), max_body=100)[0].is_complete


@pytest.mark.parametrize("aligned", [0, 1, 100])
@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3 * MIB])
def test_body_of_any_size_is_writable_and_aligned(aligned, size):
    body = random.Random(0).randbytes(size)
    decoder, _ = decode((chunk(body) if body else b"") + chunk(b""), range(1000, size, 100_000), aligned=aligned)
    data = np.frombuffer(decoder.data, np.uint8)
    assert data.tobytes() == body
    assert data.flags.writeable
    assert not size or (data.ctypes.data + aligned) % 64 == 0
