"""Train the demo model, a classifier of handwritten digits, and write it with sample requests.

    pip install '.[train]' && python -m ovms_rest.demo.train

The data are the 1,797 digits of 8x8 grey pixels that scikit-learn carries (UCI ML, optical recognition of handwritten
digits, Alpaydin and Kaynak), and generated drawings (drawings.py), because people draw on the console's pad in styles
that are rare among the former. A fifth of the digits and drawings of another seed are held out: the printed accuracies
are those of the written model in OpenVINO on these, and the samples are held-out digits.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import cv2
import openvino
import orjson
from numpy.typing import NDArray
from openvino import opset15
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from .drawings import Images, draw

HERE = Path(__file__).parent
MODEL = HERE / "digits" / "1" / "digits.xml"
SAMPLES = HERE / "samples"
SEED = 7
DRAWINGS = 1000  # of each digit, to train on
HELD_OUT_DRAWINGS = 200
# The samples, chosen because people read them without doubt: digits, and which of the held-out ones of that digit.
SINGLE = ((3, 5), (5, 1), (7, 0))
NUMBER = ((6, 1), (5, 2), (9, 2), (0, 1), (2, 1))


def load() -> tuple[Images, Images, NDArray[Any], NDArray[Any]]:
    """Return training and held-out images [n,8,8,1], white on black from 0 to 255, and their digits [n]."""
    images, digits = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.float32)
    parts: tuple[Any, ...] = tuple(train_test_split(images, digits, test_size=0.2, random_state=SEED, stratify=digits))
    return parts


def shift(images: Images, rows: int, columns: int) -> Images:
    """Move images by whole pixels; the edges are filled with black."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return padded[:, 1 + rows : 9 + rows, 1 + columns : 9 + columns]


def train(images: Images, digits: NDArray[Any]) -> MLPClassifier:
    """Train a perceptron with one hidden layer on the images, on copies moved by a pixel, and on drawings."""
    moves = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    drawings, drawn = draw(DRAWINGS, SEED, varied=True)
    examples = np.concatenate([*(shift(images, *move) for move in moves), drawings]).reshape(-1, 64) / 255
    classifier = MLPClassifier((256,), alpha=1e-3, max_iter=40, random_state=SEED)
    with threadpool_limits(1), warnings.catch_warnings():  # sums are rounded alike with any number of cores
        warnings.simplefilter("ignore", ConvergenceWarning)  # more iterations gain nothing on what is held out
        return classifier.fit(examples, np.concatenate([*[digits] * len(moves), drawn]))


def build(classifier: MLPClassifier) -> openvino.Model:
    """Return an OpenVINO model: image FP32 [-1,8,8,1] -> digit INT64 [-1], probabilities FP32 [-1,10]."""
    image = opset15.parameter([-1, 8, 8, 1], openvino.Type.f32, name="image")
    layer = opset15.divide(opset15.reshape(image, [-1, 64], special_zero=False), np.float32(255))
    for weights, bias in zip(classifier.coefs_, classifier.intercepts_, strict=True):
        product = opset15.matmul(layer, weights.astype(np.float32), transpose_a=False, transpose_b=False)
        layer = opset15.add(product, bias.astype(np.float32))
        if weights is not classifier.coefs_[-1]:
            layer = opset15.relu(layer)
    probabilities = opset15.softmax(layer, 1)
    best = opset15.topk(probabilities, np.int64(1), axis=1, mode="max", sort="value", index_element_type="i64")
    digit = opset15.squeeze(best.output(1), np.int64(1))
    image.output(0).set_names({"image"})
    digit.output(0).set_names({"digit"})
    probabilities.output(0).set_names({"probabilities"})
    model = openvino.Model([opset15.result(digit), opset15.result(probabilities)], [image], "digits")
    model.set_rt_info(" ".join(map(str, classifier.classes_)), ["model_info", "labels"])
    return model


def write_sample(image: Images, name: str) -> None:
    """Write an image as PNG, JSON request and binary request, which has the length of its JSON in the name."""
    Image.fromarray(image.reshape(8, 8).astype(np.uint8)).save(SAMPLES / f"{name}.png")
    tensor: dict[str, Any] = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8, 1]}
    (SAMPLES / f"{name}.json").write_bytes(
        orjson.dumps({"inputs": [tensor | {"data": image.ravel().tolist()}]}) + b"\n"
    )
    head = orjson.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": image.nbytes}}]})
    (SAMPLES / f"{name}-{len(head)}.bin").write_bytes(head + image.tobytes())


def write_number(images: Images, number: str) -> None:
    """Write a picture of several digits, enlarged and out of line, as PNG and as a request to the pipeline."""
    side, gap = 40, 8
    picture = np.zeros((side + 4 * gap, len(images) * (side + gap) + gap), np.uint8)
    for index, image in enumerate(images):
        large = cv2.resize(image.reshape(8, 8).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
        top, left = gap + 8 * (index % 3), gap + index * (side + gap)
        picture[top : top + side, left : left + side] = large
    file = SAMPLES / f"number-{number}.png"
    Image.fromarray(picture).save(file, optimize=True)
    encoded = file.read_bytes()
    size = {"binary_data_size": 4 + len(encoded)}
    head = orjson.dumps({"inputs": [{"name": "picture", "datatype": "BYTES", "shape": [1], "parameters": size}]})
    request = head + len(encoded).to_bytes(4, "little") + encoded
    (SAMPLES / f"number-{number}-{len(head)}.bin").write_bytes(request)


def main() -> None:
    """Train and write the model, print its accuracies, and write the samples."""
    images, held_out, digits, held_out_digits = load()
    classifier = train(images, digits)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(build(classifier), MODEL, compress_to_fp16=False)
    model = openvino.compile_model(MODEL, "CPU")
    found = model(held_out)["digit"]
    print(f"held-out accuracy: {np.mean(found == held_out_digits):.2%} of {len(held_out)} digits")
    drawings, drawn = draw(HELD_OUT_DRAWINGS, SEED + 1)
    print(f"held-out accuracy: {np.mean(model(drawings)['digit'] == drawn):.2%} of {len(drawn)} drawings")
    print(f"size: {sum(file.stat().st_size for file in MODEL.parent.iterdir())} bytes")
    SAMPLES.mkdir(exist_ok=True)
    for digit, which in SINGLE:
        write_sample(held_out[held_out_digits == digit][which], f"digit-{digit}")
    images = np.stack([held_out[held_out_digits == digit][which] for digit, which in NUMBER])
    write_number(images, "".join(str(digit) for digit, _ in NUMBER))


if __name__ == "__main__":
    main()
