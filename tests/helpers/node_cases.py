"""Nodes of pipelines.nodes for their tests: params, pictures, tensors, and formulas of their results."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ovms_rest.pipelines.definition import Library
from ovms_rest.pipelines.libraries import OVMS_LIBRARIES, load_node
from ovms_rest.pipelines.nodes import (
    add_one,
    east_ocr,
    face_blur,
    horizontal_ocr,
    image_transformation,
    object_detection,
)
from ovms_rest.pipelines.nodes.params import parse_params

# --- Nodes

SIZES = {
    "original_image_width": "16",
    "original_image_height": "12",
    "target_image_width": "5",
    "target_image_height": "4",
    "confidence_threshold": "0.5",
}
BLUR = SIZES | {"target_image_width": "16", "target_image_height": "12", "gaussian_blur_kernel_size": "3"}


def refusal(function, *arguments, **keywords):
    """Return the message of the ValueError for these arguments."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        function(*arguments, **keywords)
    return str(caught.value)


class Node:
    """A shipped node with its params, to which each call may add."""

    def __init__(self, module, params):
        self.module, self.params = module, params

    def options(self, **params):
        return parse_params(self.module.Options, self.params | params)

    def inputs(self, **params):
        """Return the forms of its inputs."""
        return self.module.inputs(self.options(**params))

    def outputs(self, **params):
        """Return the forms of its outputs."""
        return self.module.outputs(self.options(**params))

    def execute(self, arrays, **params):
        return self.module.execute(arrays, self.options(**params))

    def refusal(self, arrays, **params):
        """Return the message of the ValueError for these inputs."""
        return refusal(self.execute, arrays, **params)

    def run(self, arrays, **params):
        """Return the outputs; check that they fit their forms and that the inputs are unchanged."""
        before = {name: array.copy() for name, array in arrays.items()}
        found = self.execute(arrays, **params)
        assert all(np.array_equal(arrays[name], before[name], equal_nan=True) for name in arrays)
        forms = self.outputs(**params)
        assert sorted(found) == sorted(forms)
        dtypes = {"FP32": np.float32, "INT32": np.int32}
        for name, (datatype, dims) in forms.items():
            array = found[name]
            assert array.dtype == dtypes[datatype]
            assert array.flags.carray
            assert all(dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True))
            assert not any(np.shares_memory(array, given) for given in arrays.values())
        return found

    def load(self):
        """Load it as a pipeline does."""
        (name,) = (name for name, known in OVMS_LIBRARIES.items() if known == self.module.__name__)
        return load_node(Library("lib", name, Path("/nowhere")), self.params, timeout=60)


NODES = {
    "add_one": Node(add_one, {}),
    "image_transformation": Node(image_transformation, {"original_image_layout": "NHWC"}),
    "object_detection": Node(object_detection, SIZES),
    "horizontal_ocr": Node(horizontal_ocr, SIZES),
    "east_ocr": Node(east_ocr, SIZES),
    "face_blur": Node(face_blur, BLUR),
}

# --- Custom code

PYTHON_NODE = """
def inputs(params):
    return {"x": ("FP32", [1, 2])}

def outputs(params):
    return {"y": ("FP32", [1, 2])}

def execute(inputs, params):
    return {"y": inputs["x"] + 1}
"""


def run_python_node(node):
    """Return the number that PYTHON_NODE adds to its input."""
    return float(node.execute({"x": np.zeros((1, 2), np.float32)})["y"][0, 0])


COMPILER = shutil.which("gcc") or shutil.which("cc")


def build_c_node(file, *flags):
    """Build the library of nodes_c; return its file."""
    source = Path(__file__).parent / "nodes_c" / "node.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", *flags, "-o", file, source], check=True)
    return file


# --- Formulas


def random_image(height, width, channels=3):
    """Return a picture [H,W,C] with values from 0 to 255."""
    return np.random.default_rng(height * width).uniform(0, 255, (height, width, channels)).astype(np.float32)


def batch(picture, layout="NCHW"):
    """Return one picture as a read-only tensor."""
    array = np.ascontiguousarray((picture.transpose(2, 0, 1) if layout == "NCHW" else picture)[np.newaxis])
    array.flags.writeable = False
    return array


def floats(values, *shape):
    """Return a read-only tensor."""
    array = np.array(values, np.float32).reshape(shape)
    array.flags.writeable = False
    return array


def resized(picture, width, height):
    """Resize a picture bilinearly, with pixel centres aligned as in OpenCV."""
    rows, columns, channels = picture.shape
    result = np.empty((height, width, channels))
    for y in range(height):
        v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
        top = min(int(v), max(rows - 2, 0))
        bottom = min(top + 1, rows - 1)
        for x in range(width):
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            left = min(int(u), max(columns - 2, 0))
            right = min(left + 1, columns - 1)
            upper = picture[top, left] * (1 - u + left) + picture[top, right] * (u - left)
            lower = picture[bottom, left] * (1 - u + left) + picture[bottom, right] * (u - left)
            result[y, x] = upper * (1 - v + top) + lower * (v - top)
    return result


def gray(picture):
    """Return the weighted sum of blue, green and red."""
    return (picture @ np.array([0.114, 0.587, 0.299]))[:, :, np.newaxis]


def blurred(picture, box, kernel):
    """Blur a box with a separable kernel; the picture is mirrored at its edges, without repeating them."""
    x, y, width, height = box
    rows, columns, _ = picture.shape
    reach = len(kernel) // 2
    result = picture.astype(np.float64)
    for row in range(y, y + height):
        for column in range(x, x + width):
            total = np.zeros(3)
            for dy, vertical in enumerate(kernel, -reach):
                for dx, horizontal in enumerate(kernel, -reach):
                    v, u = abs(row + dy), abs(column + dx)
                    v, u = min(v, 2 * (rows - 1) - v), min(u, 2 * (columns - 1) - u)
                    total += picture[v, u] * (vertical * horizontal)
            result[row, column] = total
    return result


def close(array, expected, tolerance=0.01):
    """Return whether a float32 tensor is almost equal to the expected one."""
    expected = np.asarray(expected)
    assert array.dtype == np.float32
    assert array.shape == expected.shape
    return bool(np.abs(array - expected).max(initial=0) < tolerance)


# --- Tensors

NUMBERS = floats(range(10), 1, 10)
SCENE = random_image(12, 16)


def detection(*rows, count=None):
    """Return rows (image, label, confidence, x1, y1, x2, y2) as a tensor, padded with rows of confidence 0."""
    filler = [(-1, 0, 0, 0, 0, 0, 0)] * ((count or len(rows)) - len(rows))
    return floats([*rows, *filler], 1, 1, -1, 7)


def crop(x, y, width, height):
    """Return a part of the scene in the target's size."""
    return resized(SCENE[y : y + height, x : x + width], 5, 4)


def images(*pictures, layout="NCHW"):
    """Return pictures as the tensor [N,1,C,H,W]."""
    return np.stack([batch(picture, layout) for picture in pictures])
