"""Options of a model's config: every format of a value, its meaning, and the message for every mistake."""

import json

import pytest

from ovms_rest.errors import LoadError
from ovms_rest.models.options import LayoutChange, ModelOptions, Preparation, parse_options
from ovms_rest.protocol.tensors import Dim

ANY = Dim(0, None)
LARGEST = 2**63 - 1

PARENTHESES = 'expected dims in parentheses such as "(1,3,200:500,-1)", or "auto", got'
DIMS = "expected each dim to be a size, -1 for any size, or an ascending range such as 200:500, got"
BATCH = (
    'expected a size such as 16, 0 for the model\'s own, -1 for any, an ascending range such as "1:16", or "auto", got'
)
LAYOUT = (
    'expected the layouts of client and model such as "NHWC:NCHW", or one for both such as "NHWC", '
    'each letter once, "?" for any dim and "..." once for several, got'
)
NUMBERS = 'expected a number within FP32, or one for each channel such as "(123.7,116.3,103.5)", got'
DIVISORS = "expected divisors such as 255 that are not zero in FP32, got"
CHANNELS = 'needs a layout that says where the channels C are, such as "NHWC", got'
COLORS = (
    "expected the format of the model (RGB, BGR, GRAY) and that of the client (RGB, BGR, GRAY, NV12, I420), "
    'such as "RGB:BGR", got'
)
TYPE_NAMES = "fp64, fp32, fp16, bf16, int64, int32, int16, int8, uint64, uint32, uint16, uint8"
TYPES = (
    'expected the precisions of client and model such as "uint8:fp32", or the client\'s alone such as '
    f'"uint8", of {TYPE_NAMES}, got'
)


def parse(**keys):
    return parse_options(ModelOptions(**keys))


def refusal(**keys):
    with pytest.raises(LoadError) as caught:
        parse(**keys)
    return str(caught.value)


def test_no_options_change_nothing():
    assert parse() == Preparation()


# --- shape

SHAPES = [
    ("(1,3,224,224)", (Dim(1, 1), Dim(3, 3), Dim(224, 224), Dim(224, 224))),
    ("[1,3]", (Dim(1, 1), Dim(3, 3))),
    ("(-1,3,200:500)", (ANY, Dim(3, 3), Dim(200, 500))),
    (" ( 1 , -1 , 2 : 8 ) ", (Dim(1, 1), ANY, Dim(2, 8))),
    ("(7)", (Dim(7, 7),)),
    ("(0,0:1)", (Dim(0, 0), Dim(0, 1))),
    ("(007)", (Dim(7, 7),)),
    (f"({LARGEST - 1},1:{LARGEST})", (Dim(LARGEST - 1, LARGEST - 1), Dim(1, LARGEST))),
    ("()", ()),
    ("[ ]", ()),
    ("auto", None),
    (" AUTO ", None),
]


@pytest.mark.parametrize(("text", "dims"), SHAPES)
def test_shape_is_dims_in_parentheses_or_auto(text, dims):
    assert parse(shape=text).shapes == {None: dims}


def test_object_has_a_shape_per_input():
    assert parse(shape={"a": "(1,-1)", "b": "auto", "c": "()"}).shapes == {"a": (Dim(1, 1), ANY), "b": None, "c": ()}


def test_empty_object_changes_no_shape():
    assert parse(shape={}).shapes == {}


@pytest.mark.parametrize(
    "text", ["", "1,3", "(1,3", "1,3)", "(", "(1,3]", "[1,3)", "{1,3}", "automatic", "-1", "(1),", "/1/"]
)
def test_shape_without_parentheses_is_refused(text):
    assert refusal(shape=text) == f'shape: {PARENTHESES} "{text}"'


@pytest.mark.parametrize(
    "dim",
    [
        *("", "x", "1.5", "-2", "+1", "1e3", "0x1", "1_0", "٣", "²", "auto", "?", "- 1", "1 2", "(1)", "[1"),
        *(":", "1:", ":8", "8:1", "8:8", "-1:8", "1:-1", "1:2:3", "1-8"),
        str(LARGEST),
        f"0:{LARGEST + 1}",
        "0" * 20,
    ],
)
def test_malformed_dim_is_refused(dim):
    assert refusal(shape=f"(5,{dim})").startswith(f'shape: {DIMS} "{dim}" in "(5,')


def test_very_long_number_is_not_a_dim():
    """Python refuses to read a number of more than 4300 digits."""
    assert refusal(shape=f"({'9' * 5000})").startswith(f'shape: {DIMS} "999')


def test_all_invalid_dims_of_a_shape_are_reported():
    assert refusal(shape="(1,x,3,8:1,)") == f'shape: {DIMS} "x", "8:1", "" in "(1,x,3,8:1,)"'


def test_invalid_shape_is_reported_with_the_name_of_the_input():
    assert refusal(shape={"a": "(1)", "input_ids": "1", "c": "(y)"}) == (
        f'shape.input_ids: {PARENTHESES} "1"; shape.c: {DIMS} "y" in "(y)"'
    )


# --- batch_size

BATCHES = [
    (1, Dim(1, 1)),
    (16, Dim(16, 16)),
    (LARGEST - 1, Dim(LARGEST - 1, LARGEST - 1)),
    (-1, ANY),
    ("16", Dim(16, 16)),
    (" 16 ", Dim(16, 16)),
    ("-1", ANY),
    ("1:16", Dim(1, 16)),
    ("1 : 16", Dim(1, 16)),
    ("0:16", Dim(0, 16)),
    ("auto", ANY),
    ("Auto", ANY),
]


@pytest.mark.parametrize(("batch_size", "batch"), BATCHES)
def test_batch_size_is_a_size_a_range_or_any(batch_size, batch):
    assert parse(batch_size=batch_size).batch == batch


@pytest.mark.parametrize("batch_size", [0, "0"])
def test_batch_size_0_keeps_the_models_own(batch_size):
    assert parse(batch_size=batch_size) == Preparation()


@pytest.mark.parametrize(
    "batch_size",
    [
        *(-2, LARGEST, 2**64 - 1),
        *("", "many", "-2", "1.0", "(1)", "16:1", "4:4", "1:", ":4", "1:-1", "1,2", "1 6", str(LARGEST + 1)),
    ],
)
def test_invalid_batch_size_is_refused(batch_size):
    assert refusal(batch_size=batch_size) == f"batch_size: {BATCH} {json.dumps(batch_size)}"


@pytest.mark.parametrize("shape", ["(1,3)", "auto", "()", {"x": "(1,3)"}])
def test_shape_has_precedence_over_a_batch_size(shape):
    assert parse(shape=shape, batch_size=8).batch is None


def test_empty_object_of_shapes_keeps_the_batch_size():
    assert parse(shape={}, batch_size=8).batch == Dim(8, 8)


def test_invalid_batch_size_beside_a_shape_is_refused():
    assert refusal(shape="(1,3)", batch_size="x") == f'batch_size: {BATCH} "x"'


# --- layout

SAME = ("NCHW", "N", "NTC", "N...", "...C", "N...HWC", "...", "?", "N??C", "N?...C")
LAYOUTS = [
    *((text, LayoutChange(text)) for text in SAME),
    ("nchw", LayoutChange("NCHW")),
    (" N C ", LayoutChange("NC")),
    ("NHWC:nhwc", LayoutChange("NHWC")),
    ("NHWC:NCHW", LayoutChange("NCHW", client="NHWC")),
    ("nhwc : nchw", LayoutChange("NCHW", client="NHWC")),
    ("N...C:NC...", LayoutChange("NC...", client="N...C")),
]


@pytest.mark.parametrize(("text", "change"), LAYOUTS)
def test_layout_is_the_clients_and_the_models_around_a_colon(text, change):
    """The client's is None if it equals the model's."""
    assert parse(layout=text).layouts == {None: change}


def test_object_has_a_layout_per_tensor():
    changes = {"x": LayoutChange("NCHW", client="NHWC"), "out": LayoutChange("NC", client="CN")}
    assert parse(layout={"x": "NHWC:NCHW", "out": "CN:NC"}).layouts == changes


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "NHWC:", ":NCHW", "NHWC:NCHW:NCHW", "NN", "NnC", "N1", "N,C", "[N,C]", "N-C", "ß", "N\u0131"),
        *("N.C", "N..C", "N....C", "......", "...N...", "N.?..C", "NCHW:NN"),
    ],
)
def test_malformed_layout_is_refused(text):
    assert refusal(layout=text) == f'layout: {LAYOUT} "{text}"'


def test_invalid_layout_is_reported_with_the_name_of_the_tensor():
    assert refusal(layout={"x": "NN", "y": "NC", "z": ""}) == f'layout.x: {LAYOUT} "NN"; layout.z: {LAYOUT} ""'


# --- mean and scale

NUMBERS_OF = [
    (127, (127.0,)),
    (0.5, (0.5,)),
    (-1e-5, (-1e-5,)),
    ("127.5", (127.5,)),
    (" 127.5 ", (127.5,)),
    ("(5)", (5.0,)),
    ("(123.675,116.28,103.53)", (123.675, 116.28, 103.53)),
    ("[123.675,116.28,103.53]", (123.675, 116.28, 103.53)),
    (" ( -1 , +2. , .5 ) ", (-1.0, 2.0, 0.5)),
    ("(1e2,1E-2,1.5e+1)", (100.0, 0.01, 15.0)),
]


@pytest.mark.parametrize(("value", "numbers"), NUMBERS_OF)
@pytest.mark.parametrize("key", ["mean", "scale"])
def test_mean_and_scale_are_one_number_or_one_per_channel(key, value, numbers):
    assert getattr(parse(layout="NHWC", **{key: value}), key) == numbers


@pytest.mark.parametrize(
    "text",
    [
        *("", "()", "[]", "(", "x", "(1,2", "1,2", "(1,,2)", "(1,2,)", "((1,2))", "(1;2)", "(1 2)", "(1,x)"),
        *("nan", "inf", "-inf", "(1,Infinity)", "1_0", "0x1", "٣", "1e", ".", "1e39", "-1e39", "1e999"),
    ],
)
@pytest.mark.parametrize("key", ["mean", "scale"])
def test_text_without_numbers_is_refused(key, text):
    assert refusal(layout="NHWC", **{key: text}) == f'{key}: {NUMBERS} "{text}"'


@pytest.mark.parametrize("key", ["mean", "scale"])
def test_number_beyond_fp32_is_refused(key):
    assert refusal(**{key: 1e39}) == f"{key}: {NUMBERS} 1e+39"


@pytest.mark.parametrize("key", ["mean", "scale"])
def test_largest_number_of_fp32_is_accepted(key):
    assert getattr(parse(**{key: 3.4028234663852886e38}), key) == (3.4028234663852886e38,)


def test_mean_may_be_zero():
    assert parse(mean="(0,1,2)", layout="NHWC").mean == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("scale", "shown"), [(0, "0"), (-0.0, "-0.0"), ("0", '"0"'), ("(1,0,2)", '"(1,0,2)"'), (1e-60, "1e-60")]
)
def test_scale_of_zero_is_refused(scale, shown):
    """1e-60 becomes 0 in FP32, in which OpenVINO divides."""
    assert refusal(scale=scale, layout="NHWC") == f"scale: {DIVISORS} {shown}"


@pytest.mark.parametrize("value", [5, 0.5, "5", "(5)", "[5]"])
@pytest.mark.parametrize("key", ["mean", "scale"])
def test_single_number_needs_no_layout(key, value):
    assert parse(**{key: value}).layouts == {}


# --- Which dim the channels are

OF_CHANNELS = [{"mean": "(1,2,3)"}, {"scale": "(1,2,3)"}, {"color_format": "RGB:BGR"}]


@pytest.mark.parametrize(
    ("layout", "shown"),
    [(None, "none"), ("N...", '"N..."'), ("NHW?", '"NHW?"'), ({"x": "NHW"}, '{"x":"NHW"}'), ({}, "none")],
)
@pytest.mark.parametrize("keys", OF_CHANNELS)
def test_values_per_channel_need_a_layout_with_c(keys, layout, shown):
    (key,) = keys
    assert refusal(layout=layout, **keys) == f"{key}: {CHANNELS} {shown}"


@pytest.mark.parametrize("layout", ["NCHW", "...c", "NHWC:NCHW", {"x": "NHWC"}])
@pytest.mark.parametrize("keys", OF_CHANNELS)
def test_any_layout_with_c_shows_the_channels(keys, layout):
    assert parse(layout=layout, **keys).layouts


@pytest.mark.parametrize("keys", OF_CHANNELS)
def test_invalid_layout_is_not_also_reported_as_missing(keys):
    assert refusal(layout="NN", **keys) == f'layout: {LAYOUT} "NN"'


# --- color_format

COLOR_FORMATS = ["RGB:BGR", "rgb:bgr", " BGR : RGB ", "BGR:BGR", "GRAY:RGB", "RGB:GRAY", "RGB:NV12", "BGR:i420"]


@pytest.mark.parametrize("text", COLOR_FORMATS)
def test_color_format_is_the_models_and_the_clients_around_a_colon(text):
    model, client = text.replace(" ", "").upper().split(":")
    assert parse(color_format=text, layout="NHWC").color == (model, client)


@pytest.mark.parametrize(
    "text", ["", ":", "RGB", "RGB:", ":RGB", "RGB:BGR:GRAY", "RGB BGR", "CMYK:RGB", "RGB:CMYK", "NV12:RGB", "I420:BGR"]
)
def test_malformed_color_format_is_refused(text):
    assert refusal(color_format=text, layout="NHWC") == f'color_format: {COLORS} "{text}"'


@pytest.mark.parametrize(
    ("text", "name"),
    [("RGB:NV12_2", "NV12_2"), ("nv12_2:rgb", "NV12_2"), ("NV12_2", "NV12_2"), ("RGB:I420_3", "I420_3")],
)
def test_planes_in_separate_tensors_are_refused_with_an_alternative(text, name):
    instead = name[:4]
    assert refusal(color_format=text, layout="NHWC") == (
        f"color_format: {name} is not supported, because its planes would be additional inputs; use {instead} in one "
        f'tensor, as in "RGB:{instead}", got "{text}"'
    )


# --- precision

OPENVINO_NAMES = "f64 f32 f16 bf16 i64 i32 i16 i8 u64 u32 u16 u8"
PRECISIONS = list(zip(TYPE_NAMES.split(", "), OPENVINO_NAMES.split(), strict=True))


@pytest.mark.parametrize(("name", "openvino_name"), PRECISIONS)
def test_precision_is_the_clients_and_the_models_around_a_colon(name, openvino_name):
    assert parse(precision=f"{name}:fp32").precision == (openvino_name, "f32")


@pytest.mark.parametrize(("name", "openvino_name"), PRECISIONS)
def test_single_precision_is_the_clients(name, openvino_name):
    assert parse(precision=name).precision == (openvino_name, "")


@pytest.mark.parametrize("text", ["UINT8:FP32", "Uint8:fp32", " uint8 : fp32 "])
def test_case_and_spaces_of_a_precision_are_ignored(text):
    assert parse(precision=text).precision == ("u8", "f32")


@pytest.mark.parametrize("text", ["", ":", "uint8:", ":fp32", "uint8:fp32:fp16", "u8", "float", "fp32:bool", "fp32,u8"])
def test_malformed_precision_is_refused(text):
    assert refusal(precision=text) == f'precision: {TYPES} "{text}"'


@pytest.mark.parametrize(
    ("text", "name"), [("int4", "int4"), ("UINT4:fp32", "uint4"), ("fp32:uint1", "uint1"), ("int4:uint4", "int4")]
)
def test_type_without_a_datatype_is_refused(text, name):
    assert refusal(precision=text) == (
        f"precision: {name} is not supported, because KServe has no datatype for it; supported are {TYPE_NAMES}, as in "
        f'"uint8:fp32", got "{text}"'
    )


# --- Several options


def test_every_key_of_an_image_model_is_read():
    numbers = {"mean": "(123.675,116.28,103.53)", "scale": "[58.395,57.12,57.375]"}
    names = {"layout": "NHWC:NCHW", "color_format": "RGB:BGR", "precision": "uint8:fp32"}
    assert parse(batch_size="1:16", **numbers, **names) == Preparation(
        batch=Dim(1, 16),
        layouts={None: LayoutChange("NCHW", client="NHWC")},
        mean=(123.675, 116.28, 103.53),
        scale=(58.395, 57.12, 57.375),
        color=("RGB", "BGR"),
        precision=("u8", "f32"),
    )


def test_all_problems_are_reported_together():
    wrong = {"shape": {"x": "1", "y": "(z)"}, "batch_size": "b", "layout": "NN", "color_format": "RGB"}
    assert refusal(**wrong, mean="m", scale="0", precision="p").split("; ") == [
        f'layout: {LAYOUT} "NN"',
        f'shape.x: {PARENTHESES} "1"',
        f'shape.y: {DIMS} "z" in "(z)"',
        f'batch_size: {BATCH} "b"',
        f'mean: {NUMBERS} "m"',
        f'scale: {DIVISORS} "0"',
        f'color_format: {COLORS} "RGB"',
        f'precision: {TYPES} "p"',
    ]


def test_missing_layout_is_reported_with_other_problems():
    assert refusal(mean="(1,2,3)", scale="(1,2,3)", precision="p").split("; ") == [
        f'precision: {TYPES} "p"',
        f"mean: {CHANNELS} none",
        f"scale: {CHANNELS} none",
    ]


def test_long_value_is_cut_in_the_message():
    assert refusal(precision="x" * 999) == f'precision: {TYPES} "{"x" * 59}...'
