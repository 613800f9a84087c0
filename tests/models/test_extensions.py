"""Extension libraries; test_text.py loads models with them."""

import pytest

from ovms_rest.errors import LoadError
from ovms_rest.models.extensions import extend, find_tokenizers, lacks_operations


class FakeCore:
    """An OpenVINO that loads one library only."""

    def add_extension(self, library):
        if library != "good.so":
            raise RuntimeError("Cannot load\n library")


@pytest.mark.parametrize(
    ("text", "lacks"),
    [("Cannot create StringTensorUnpack layer", True), ("unsupported opset: extension", True), ("garbage", False)],
)
def test_missing_operations_are_recognized_by_openvinos_message(text, lacks):
    assert lacks_operations(RuntimeError(text)) == lacks


def test_library_of_the_tokenizers_is_a_file_of_the_installed_package():
    assert find_tokenizers().endswith("/openvino_tokenizers/lib/libopenvino_tokenizers.so")


def test_library_that_openvino_refuses_is_reported_in_one_line():
    core = FakeCore()
    extend(core, "good.so")
    with pytest.raises(
        LoadError, match=r"^cpu_extension: bad.so cannot be loaded .* of OpenVINO: Cannot load library$"
    ):
        extend(core, "bad.so")
