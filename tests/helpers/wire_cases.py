"""A table of tensors in JSON, in binary and in memory, for the tests of decoding and encoding."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ovms_rest.protocol.strings import BytesArray
from ovms_rest.protocol.tensors import Array

BF16 = ml_dtypes.bfloat16


class Case(NamedTuple):
    """A tensor in its three forms; `data` is flat, the binary form is in hexadecimal digits."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]
    binary: bytes
    array: Array

    def input(self, **keys: Any) -> dict[str, Any]:
        """Return it as an input of a request, with these keys."""
        return {"name": "x", "shape": self.shape, "datatype": self.datatype, **keys}


def _numbers(name: str, shape: tuple[int, ...], data: list[Any], digits: str) -> Case:
    datatype = name.split(" ", 1)[0]
    return Case(name, datatype, shape, data, bytes.fromhex(digits), np.array(data, DTYPES[datatype]).reshape(shape))


def _strings(name: str, shape: tuple[int, ...], data: list[str], digits: str) -> Case:
    array = BytesArray.of([item.encode() for item in data], shape)
    return Case(f"BYTES {name}", "BYTES", shape, data, bytes.fromhex(digits), array)


def fingerprint(array: Array) -> tuple[Any, ...]:
    """Return values that are equal exactly when two arrays are equal bit for bit."""
    if isinstance(array, BytesArray):
        return "BYTES", array.shape, array.elements()
    return array.dtype, array.shape, array.tobytes()


DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "BF16": BF16,
    "FP32": np.float32,
    "FP64": np.float64,
}

CASES = [
    _numbers("BOOL", (4,), [True, False, False, True], "01 00 00 01"),
    _numbers("BOOL scalar", (), [True], "01"),
    _numbers("BOOL rank 3", (1, 2, 1), [False, True], "00 01"),
    _numbers("INT8 extremes", (3,), [-128, 0, 127], "80 00 7f"),
    _numbers("INT8 scalar", (), [-1], "ff"),
    _numbers("INT8 rank 3", (2, 1, 2), [1, -1, 2, -2], "01 ff 02 fe"),
    _numbers("INT16 extremes", (3,), [-32768, 0, 32767], "0080 0000 ff7f"),
    _numbers("INT16 scalar", (), [0x0102], "0201"),
    _numbers("INT16 rank 3", (1, 1, 2), [1, -2], "0100 feff"),
    _numbers("INT32 extremes", (3,), [-(2**31), 0, 2**31 - 1], "00000080 00000000 ffffff7f"),
    _numbers("INT32 scalar", (), [0x01020304], "04030201"),
    _numbers("INT32 rank 3", (2, 1, 2), [1, 2, 3, -4], "01000000 02000000 03000000 fcffffff"),
    _numbers(
        "INT64 extremes",
        (2, 2),
        [-(2**63), -1, 2**53 + 1, 2**63 - 1],
        "0000000000000080 ffffffffffffffff 0100000000002000 ffffffffffffff7f",
    ),
    _numbers("INT64 scalar", (), [0x0102030405060708], "0807060504030201"),
    _numbers("INT64 rank 3", (1, 2, 1), [7, -7], "0700000000000000 f9ffffffffffffff"),
    _numbers("UINT8 extremes", (3,), [0, 1, 255], "00 01 ff"),
    _numbers("UINT8 scalar", (), [200], "c8"),
    _numbers("UINT8 rank 3", (1, 3, 1), [1, 2, 3], "01 02 03"),
    _numbers("UINT16 extremes", (3,), [0, 0x0102, 65535], "0000 0201 ffff"),
    _numbers("UINT16 scalar", (), [40000], "409c"),
    _numbers("UINT16 rank 3", (2, 1, 1), [1, 2], "0100 0200"),
    _numbers("UINT32 extremes", (3,), [0, 0x01020304, 2**32 - 1], "00000000 04030201 ffffffff"),
    _numbers("UINT32 scalar", (), [2**31], "00000080"),
    _numbers("UINT32 rank 3", (1, 2, 1), [5, 6], "05000000 06000000"),
    _numbers(
        "UINT64 extremes",
        (4,),
        [0, 2**53 + 1, 2**63, 2**64 - 1],
        "0000000000000000 0100000000002000 0000000000000080 ffffffffffffffff",
    ),
    _numbers("UINT64 scalar", (), [1], "0100000000000000"),
    _numbers("UINT64 rank 3", (1, 1, 2), [2, 3], "0200000000000000 0300000000000000"),
    _numbers("FP16", (2, 2), [0.0, -0.0, 1.5, -2.0], "0000 0080 003e 00c0"),
    _numbers("FP16 extremes", (4,), [65504.0, -65504.0, 6.103515625e-05, 5.960464477539063e-08], "ff7b fffb 0004 0100"),
    _numbers("FP16 scalar", (), [0.0999755859375], "662e"),
    _numbers("FP16 rank 3", (1, 2, 1), [1.0, 2.0], "003c 0040"),
    _numbers("BF16", (2, 2), [0.0, -0.0, 1.0, -2.5], "0000 0080 803f 20c0"),
    _numbers(
        "BF16 extremes",
        (4,),
        [3.3895313892515355e38, -3.3895313892515355e38, 1.1754943508222875e-38, 9.183549615799121e-41],
        "7f7f 7fff 8000 0100",
    ),
    _numbers("BF16 scalar", (), [0.10009765625], "cd3d"),
    _numbers("BF16 rank 3", (1, 2, 1), [1.0, 2.0], "803f 0040"),
    _numbers("FP32", (2, 2), [0.1, -0.0, 1.0, 16777216.0], "cdcccc3d 00000080 0000803f 0000804b"),
    _numbers(
        "FP32 extremes",
        (4,),
        [3.4028235e38, -3.4028235e38, 1.1754944e-38, 1e-45],
        "ffff7f7f ffff7fff 00008000 01000000",
    ),
    _numbers("FP32 scalar", (), [0.33333334], "abaaaa3e"),
    _numbers("FP32 rank 3", (1, 2, 1), [0.5, 2.0], "0000003f 00000040"),
    _numbers("FP64", (3,), [0.1, -0.0, 1 / 3], "9a9999999999b93f 0000000000000080 555555555555d53f"),
    _numbers(
        "FP64 extremes",
        (4,),
        [1.7976931348623157e308, -1.7976931348623157e308, 2.2250738585072014e-308, 5e-324],
        "ffffffffffffef7f ffffffffffffefff 0000000000001000 0100000000000000",
    ),
    _numbers("FP64 scalar", (), [1.0000000000000002], "010000000000f03f"),
    _numbers("FP64 rank 3", (1, 2, 1), [0.5, 2.0], "000000000000e03f 0000000000000040"),
    _strings("ASCII", (2,), ["a", "bc"], "01000000 61  02000000 6263"),
    _strings("scalar", (), ["abc"], "03000000 616263"),
    _strings("rank 3", (2, 1, 2), ["a", "b", "c", "d"], "01000000 61  01000000 62  01000000 63  01000000 64"),
    _strings("empty strings", (3,), ["", "a", ""], "00000000  01000000 61  00000000"),
    _strings("NULs at the end", (3,), ["a\0", "\0\0", "\0b\0"], "02000000 6100  02000000 0000  03000000 006200"),
    _strings("beyond ASCII", (2, 1), ["\u00e9\u65e5", "\U0001f600"], "05000000 c3a9e697a5  04000000 f09f9880"),
    _strings("JSON's special characters", (2,), ['"\\/', "\b\f\n\r\t\x7f"], "03000000 225c2f  06000000 080c0a0d097f"),
    _strings("length of two bytes", (1,), ["x" * 300], "2c010000" + "78" * 300),
    *(_numbers(f"{datatype} of no element", (0,), [], "") for datatype in DTYPES),
    *(_numbers(f"{datatype} of no element, rank 3", (2, 0, 3), [], "") for datatype in DTYPES),
    _numbers("FP64 of no element, large besides", (2**20, 0), [], ""),
    _strings("of no element", (0,), [], ""),
    _strings("of no element, rank 3", (2, 0, 3), [], ""),
]
