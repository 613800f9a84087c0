"""Where OpenVINO rounds differently in a batch: each row in batches of 2 to 32 against the same row alone.

    PYTHONPATH=tests/helpers python tests/benchmarks/rounding.py

Compiled as in a worker, in FP32 and as by default. A difference is the largest of any batch, relative to the largest
output; "among batches" is that between a row in a batch of 2 and in larger ones.
"""

import batching
import model_zoo
import numpy as np
import openvino
from measure import arguments, machine
from openvino import PartialShape, Type, opset15
from service import ROOT

BATCHES = (2, 3, 4, 7, 8, 16, 32)
RANDOM = np.random.default_rng(0)


def constant(*shape):
    return opset15.constant(RANDOM.standard_normal(shape, np.float32) / np.sqrt(shape[-1], dtype=np.float32))


def of(*row, function):
    """Return a model x FP32 [-1,*row] -> y."""
    x = model_zoo.parameter("x", (-1, *row), Type.f32)
    return model_zoo.model_of({"y": function(x)}, [x])


def layer(inputs, outputs, activation=None, tokens=()):
    def function(x):
        y = opset15.add(opset15.matmul(x, constant(outputs, inputs), False, True), constant(1, outputs))
        return activation(y) if activation else y

    return of(*tokens, inputs, function=function)


def int8(inputs, outputs):
    def quantize(x, limit):
        low, high = opset15.constant(np.float32(-limit)), opset15.constant(np.float32(limit))
        return opset15.fake_quantize(x, low, high, low, high, 255)

    def function(x):
        return opset15.relu(opset15.matmul(quantize(x, 4), quantize(constant(outputs, inputs), 0.2), False, True))

    return of(inputs, function=function)


def convolution(channels, filters, kernel, size):
    def function(x):
        weights, pads = constant(filters, channels, kernel, kernel), [kernel // 2] * 2
        return opset15.relu(opset15.convolution(x, weights, [1, 1], pads, pads, [1, 1]))

    return of(channels, size, size, function=function)


def attention(x):
    scores = opset15.matmul(x, x, False, True)
    return opset15.matmul(opset15.softmax(scores, 2), x, False, False)


def normalization(x):
    return opset15.mvn(x, opset15.constant([1]), True, 1e-6, "inside_sqrt")


def resnet50():
    model = model_zoo.resnet50()
    model.reshape(PartialShape([-1, 3, 224, 224]))
    return model


CASES = {
    "relu, sigmoid, gelu of 100": lambda: of(
        100, function=lambda x: opset15.gelu(opset15.sigmoid(opset15.relu(x)), "erf")
    ),
    "softmax of 10": lambda: of(10, function=lambda x: opset15.softmax(x, 1)),
    "softmax of 1000": lambda: of(1000, function=lambda x: opset15.softmax(x, 1)),
    "normalization of 256": lambda: of(256, function=normalization),
    "attention, 50 tokens of 33": lambda: of(50, 33, function=attention),
    "convolution 3x3, 30 to 50 channels": lambda: convolution(30, 50, 3, 17),
    "convolution 1x1, 512 to 512 channels": lambda: convolution(512, 512, 1, 7),
    "digits (the demo)": lambda: openvino.Core().read_model(ROOT / "ovms_rest/demo/digits/1/digits.xml"),
    "ResNet-50": resnet50,
    "layer for 16 tokens, 384 to 1536, gelu": lambda: layer(384, 1536, lambda x: opset15.gelu(x, "erf"), (16,)),
    "encoder of batching.py": batching.encoder,
    "layer in INT8, 100 to 77, relu": lambda: int8(100, 77),
    "layer 30 to 5": lambda: layer(30, 5),
    "layer 64 to 64": lambda: layer(64, 64),
    "layer 100 to 100": lambda: layer(100, 100),
    "layer 100 to 100, relu": lambda: layer(100, 100, opset15.relu),
    "layer 768 to 3072, relu": lambda: layer(768, 3072, opset15.relu),
    "layer 2048 to 1000": lambda: layer(2048, 1000),
    "layer 2048 to 1000, relu": lambda: layer(2048, 1000, opset15.relu),
    "layer 4096 to 1000, relu": lambda: layer(4096, 1000, opset15.relu),
    "layer 7168 to 7168, relu": batching.perceptron,
}


def compare(model, **hints):
    """Return the largest differences of rows in batches from those alone, and from those in a batch of 2."""
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, **hints})
    request, port = compiled.create_infer_request(), compiled.input(0)
    shape = (max(BATCHES), *(dim.get_length() for dim in list(port.partial_shape)[1:]))
    is_tokens = port.element_type == Type.i64
    x = RANDOM.integers(0, batching.WORDS, shape) if is_tokens else RANDOM.standard_normal(shape, np.float32)

    def infer(rows):
        parts = [np.array([*request.infer([x[at : at + rows]]).values()][-1]) for at in range(0, len(x), rows)]
        return np.concatenate(parts)

    alone, pairs, *larger = [infer(rows) for rows in (1, *BATCHES)]
    largest = np.abs(alone).max()
    return [
        max(float(np.abs(found - expected).max() / largest) for found in batches)
        for batches, expected in (([pairs, *larger], alone), (larger, pairs))
    ]


def main():
    """Measure and print the table."""
    arguments()
    print(f"{machine()}; OpenVINO {openvino.__version__}\n")
    print("| model | FP32 | among batches | default | among batches |\n|---|---|---|---|---|")
    for name, make in CASES.items():
        model = make()
        found = compare(model, INFERENCE_PRECISION_HINT="f32") + compare(model)
        print(f"| {name} | " + " | ".join(f"{each:.0e}" if each else "equal" for each in found) + " |", flush=True)


if __name__ == "__main__":
    main()
