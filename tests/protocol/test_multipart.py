"""multipart/form-data: what the encoders of others write is read, and everything else is refused."""

import email.message
import email.policy
import re

import pytest
import urllib3.filepost
from calls import called
from decoded_requests import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ovms_rest.errors import InvalidRequestError
from ovms_rest.protocol.multipart import MAX_HEADER, MAX_PARTS, Part, read_media_type, split_parts

TYPE = "multipart/form-data; boundary=B"
NAMED = b'Content-Disposition: form-data; name="x"'
ONE = b"--B\r\n" + NAMED + b"\r\n\r\ndata\r\n--B--\r\n"


def split(body, content_type=TYPE):
    """Return the parts as tuples without their offsets, with their data as bytes."""
    return [(part.name, bytes(part.data), *part[3:]) for part in split_parts(memoryview(body), content_type)]


def header_of(*lines, data=b"data"):
    """Return the only part of a form with these header lines."""
    (part,) = split(b"--B\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + data + b"\r\n--B--\r\n")
    return part


def refusal(body, content_type=TYPE):
    return refused(split_parts, memoryview(body), content_type)


def refusal_of_header(*lines):
    return refused(header_of, *lines)


# --- The encoders of others


boundaries = st.from_regex(r"[0-9A-Za-z'()+_,./:=?-]{1,70}", fullmatch=True)
letters = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters='"\\%')
names = st.text(letters, min_size=1, max_size=20)
# Bytes of which boundaries and line ends are made, too.
contents = st.binary(max_size=80) | st.lists(st.sampled_from([b"\r\n", b"--", b"B", b"-", b"\r", b"\n", b" "])).map(
    b"".join
)
types = st.sampled_from(["", "image/png", "application/octet-stream", "text/plain; charset=utf-8"])


def holds(boundary, datas):
    """Return whether data has a delimiter, which an encoder avoids by its choice of the boundary."""
    return any(b"\r\n--" + boundary.encode() in b"\r\n" + data for data in datas)


@settings(max_examples=150)
@given(boundaries, st.lists(st.tuples(names, contents, types, st.booleans()), min_size=1, max_size=5))
@example("B", [("x", b"\r\n--", "", False), ("x", b"", "", True)])
@example("-", [("x", b"\r\n-", "", False)])
def test_forms_of_urllib3_are_read(boundary, fields):
    """They are those of `requests`, too."""
    if holds(boundary, [data for _, data, _, _ in fields]):
        return
    sent = []
    for name, data, media_type, is_file in fields:
        field = urllib3.fields.RequestField(name, data, filename="f" if is_file else None)
        field.make_multipart(content_type=media_type or None)
        sent.append(field)
    body, content_type = urllib3.filepost.encode_multipart_formdata(sent, boundary)
    assert content_type == f"multipart/form-data; boundary={boundary}"
    if re.search(r"[(),/:=?]", boundary):
        content_type = f'multipart/form-data; boundary="{boundary}"'  # RFC 9110 section 5.6.6, which urllib3 ignores
    assert split(body, content_type) == [
        (name, data, read_media_type(media_type), is_file, None) for name, data, media_type, is_file in fields
    ]


@settings(max_examples=40)
@given(st.lists(st.tuples(names, st.binary(max_size=40).map(bytes.hex), st.booleans()), min_size=1, max_size=3))
def test_forms_of_the_email_package_are_read(fields):
    """It writes names beyond ASCII as RFC 5987 says."""
    policy = email.policy.HTTP
    form = email.message.EmailMessage(policy)
    form.add_header("Content-Type", "multipart/form-data", boundary="B")
    for name, data, is_file in fields:
        part = email.message.EmailMessage(policy)
        part.set_content(data.encode(), "application", "octet-stream", cte="8bit")
        part.add_header("Content-Disposition", "form-data")
        part.set_param("name", name, "Content-Disposition")
        if is_file:
            part.set_param("filename", "f", "Content-Disposition")
        form.attach(part)
    body = form.as_bytes().partition(b"\r\n\r\n")[2]
    assert split(body) == [
        (name, data.encode(), "application/octet-stream", is_file, None) for name, data, is_file in fields
    ]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b'name="a b"', "a b"),
        (b"name=a", "a"),
        (b'name=""', ""),
        (b'NAME="a"', "a"),
        (b'name="a;b=c"', "a;b=c"),
        (b'name="\xc3\xa9"', "\u00e9"),
        (b'name="a\\"b\\\\c"', 'a"b\\c'),
        (b'name="a%22b%0D%0a%41"', 'a"b\r\n%41'),
        (b"name*=utf-8''%C3%A9%20x", "\u00e9 x"),
        (b"name=ascii; name*=UTF-8'en'%c3%a9", "\u00e9"),
    ],
)
def test_name_is_read_as_clients_escape_it(written, name):
    assert header_of(b"Content-Disposition: form-data; " + written)[0] == name


@pytest.mark.parametrize(
    "lines",
    [
        [b"content-disposition:form-data;name=x"],
        [b"CONTENT-DISPOSITION: \t Form-Data ; name = x ; "],
        [b"Content-Disposition: form-data;", b'   name="x"'],
        [b"A: b", NAMED, b"C:"],
        [NAMED, b"Content-Transfer-Encoding: Binary"],
    ],
)
def test_header_may_be_written_in_any_form(lines):
    assert header_of(*lines) == ("x", b"data", "", False, None)


@pytest.mark.parametrize("written", [b'filename="a.png"', b"filename=a", b'filename=""', b"filename*=utf-8''a"])
def test_part_with_a_file_name_is_a_file(written):
    assert header_of(NAMED + b"; " + written) == ("x", b"data", "", True, None)


def test_part_has_its_media_type_and_shape():
    part = header_of(NAMED, b"Content-Type: Image/PNG; x=y", b"X-Tensor-Shape: 1, 2")
    assert part == ("x", b"data", "image/png", False, "1, 2")


@pytest.mark.parametrize(
    "data",
    [b"", b"\r\n", b"\r\n\r\n", b"--", b"\r\n--", b"\r\n--C", b"\r\n--Bx", b"\r\n--B-", b"\n--B\n", bytes(range(256))],
)
def test_data_may_be_anything_but_the_boundary(data):
    assert header_of(NAMED, data=data)[1] == data


def test_data_is_a_view_on_the_body():
    body = memoryview(bytearray(ONE))
    (part,) = split_parts(body, TYPE)
    body[body.obj.rindex(b"data")] = ord("D")
    assert bytes(part.data) == b"Data"
    assert body[part.begin : part.begin + 4] == b"Data"


@pytest.mark.parametrize(
    "body",
    [ONE.replace(b"--B\r\n", b"--B \t\r\n"), ONE[:-2], ONE.replace(b"--B--", b"--B-- "), ONE + b"\r\n \t"],
    ids=["space after the boundary", "no last line break", "space after the last boundary", "blank lines at the end"],
)
def test_white_space_around_boundaries_is_ignored(body):
    assert split(body) == [("x", b"data", "", False, None)]


@pytest.mark.parametrize("epilogue", [b"more", b"\r\n", b"--B\r\n", b"\r\n--B\r\n" + NAMED + b"\r\n\r\n2\r\n--B--"])
def test_epilogue_is_ignored(epilogue):
    """RFC 2046 section 5.1.1 allows it."""
    assert split(ONE + epilogue) == [("x", b"data", "", False, None)]


@pytest.mark.parametrize("data", [b"\r\n--Ba", b"\r\n--B-", b"\r\n--B--a", b"\r\n--B \t\r", b"\r\n--B--\r"])
def test_data_that_begins_like_a_boundary_is_skipped_without_a_call(data):
    """A call for each took 16 s for the largest body."""
    body = b"--B\r\n" + NAMED + b"\r\n\r\n" + data * 1000 + b"\r\n--B--"
    assert split(body)[0][1] == data * 1000
    assert len(called(split_parts, memoryview(body), TYPE)) < 1000


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ('multipart/form-data; boundary="B c"', b"B c"),
        ("Multipart/Form-Data;charset=utf-8;Boundary=B'c", b"B'c"),
        (f"multipart/form-data; boundary={'b' * 70}", b"b" * 70),
    ],
)
def test_boundary_is_a_parameter_of_the_content_type(content_type, boundary):
    assert len(split(ONE.replace(b"--B", b"--" + boundary), content_type)) == 1


# --- Refusals


@pytest.mark.parametrize(
    "content_type",
    [
        *("multipart/form-data", "multipart/form-data;", "multipart/form-data; boundary=", "multipart/form-data; x=B"),
        *('multipart/form-data; boundary=""', 'multipart/form-data; boundary="B', "multipart/form-data; boundary B"),
        *(f"multipart/form-data; boundary={'b' * 71}", 'multipart/form-data; boundary="B "'),
        "multipart/form-data; boundary=\xe9",
    ],
)
def test_content_type_without_a_valid_boundary_is_rejected(content_type):
    message = refusal(ONE, content_type)
    assert message.startswith('Content-Type is "multipart/form-data')
    assert message.endswith(
        ", without a valid boundary of multipart/form-data; let the client set the header, as `curl -F` does"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty, expected the parts of multipart/form-data"),
        (b"--", 'the body does not begin with the line "--B", the boundary that Content-Type names'),
        (b"--C" + ONE, 'the body does not begin with the line "--B", the boundary that Content-Type names'),
        (b"text\r\n" + ONE, 'the body does not begin with the line "--B", the boundary that Content-Type names'),
        (
            ONE.replace(b"\r\n", b"\n"),
            'the body does not begin with the line "--B", the boundary that Content-Type names',
        ),
        (b"--B--\r\n", 'the body does not begin with the line "--B", the boundary that Content-Type names'),
        (b"--B\r\n", 'the body ends in part 0, before the last boundary, the line "--B--"'),
        (ONE[:-6], 'the body ends in part 0, before the last boundary, the line "--B--"'),
        (ONE[:-4], 'the body ends in part 0, before the last boundary, the line "--B--"'),
        (ONE[:-2] + b"more", 'the body ends in part 0, before the last boundary, the line "--B--"'),
        (ONE[:-4] + b"\r\n", 'the body ends in part 1, before the last boundary, the line "--B--"'),
        (b"--B\r\n--B--", "part 0 has no empty line between its header and its data"),
        (b"--B\r\ndata\r\n--B--", "part 0 has no empty line between its header and its data"),
    ],
)
def test_form_without_its_lines_is_rejected(body, message):
    assert refusal(body) == message


EXPECTED = "expected 'form-data; name=\"INPUT\"' with the name of an input"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], f"part 0: Content-Disposition is missing, {EXPECTED}"),
        ([b"A: b"], f"part 0: Content-Disposition is missing, {EXPECTED}"),
        ([b"Content-Disposition: form-data"], f'part 0: Content-Disposition is "form-data", {EXPECTED}'),
        (
            [b"Content-Disposition: attachment; name=x"],
            f'part 0: Content-Disposition is "attachment; name=x", {EXPECTED}',
        ),
        (
            [b'Content-Disposition: form-data; name="x'],
            f'part 0: Content-Disposition is "form-data; name=\\"x", {EXPECTED}',
        ),
        (
            [b"Content-Disposition: form-data; name*=latin1''x"],
            f"part 0: Content-Disposition is \"form-data; name*=latin1''x\", {EXPECTED}",
        ),
        ([NAMED, b"no colon"], "part 0 has the header line \"no colon\", expected 'NAME: VALUE'"),
        ([NAMED, b"a b: c"], "part 0 has the header line \"a b: c\", expected 'NAME: VALUE'"),
        ([NAMED, NAMED], "part 0 has the header Content-Disposition more than once"),
        (
            [NAMED, b"Content-Transfer-Encoding: base64"],
            "part 0 'x': Content-Transfer-Encoding is \"base64\", expected the data as it is (binary)",
        ),
    ],
)
def test_invalid_header_of_a_part_is_rejected(lines, message):
    assert refusal_of_header(*lines) == message


def test_header_of_a_part_is_limited():
    fill = MAX_HEADER - len(NAMED) - len("\r\nA: ")
    assert header_of(NAMED, b"A: " + b"a" * fill)[0] == "x"
    message = f"part 0 has a header of more than {MAX_HEADER} bytes, the limit"
    assert refusal_of_header(NAMED, b"A: " + b"a" * (fill + 1)) == message


def test_number_of_parts_is_limited():
    part = ONE.removesuffix(b"--B--\r\n")
    assert len(split(part * MAX_PARTS + b"--B--")) == MAX_PARTS
    assert refusal(part * (MAX_PARTS + 1) + b"--B--") == f"the body has more than {MAX_PARTS} parts, the limit"


def test_message_names_the_index_of_a_later_part():
    body = ONE.removesuffix(b"--B--\r\n") + b"--B\r\nA: b\r\n\r\n\r\n--B--"
    assert refusal(body).startswith("part 1: Content-Disposition is missing")


@settings(max_examples=250)
@given(
    st.lists(
        st.sampled_from(
            [
                b"--B",
                b"--B--",
                b"\r\n",
                b"\r\n\r\n",
                NAMED,
                b": ",
                b"; ",
                b'"',
                b"=",
                b"\\",
                b" ",
                b"data",
                b"\xff",
                b"-",
            ]
        )
    ).map(b"".join)
    | st.binary(max_size=50).map(lambda data: b"--B\r\n" + data)
)
def test_any_bytes_are_rejected_or_read(body):
    try:
        parts = split_parts(memoryview(body), TYPE)
    except InvalidRequestError:
        return
    assert parts
    assert all(type(part) is Part for part in parts)


@settings(max_examples=150)
@given(st.text(max_size=60).map(lambda text: f"multipart/form-data{text}"))
def test_any_content_type_is_rejected_or_read(content_type):
    try:
        assert split(ONE, content_type)
    except InvalidRequestError:
        return
