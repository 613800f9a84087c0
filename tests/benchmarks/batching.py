"""Queued requests inferred together: each model with `max_batch_size` against the same one without.

    PYTHONPATH=tests/helpers python tests/benchmarks/batching.py [SECONDS [ROUNDS]]

Two workers, 32 connections, requests of one row; then one connection. Needs wrk (Debian: apt-get install wrk).
"""

import json
import tempfile
from pathlib import Path

import model_zoo
import numpy as np
from measure import arguments, load, machine, mean
from openvino import Type, opset15
from service import serve, write_config

WORKERS = 2
CONNECTIONS = 32
LIMIT = 32
WIDTH = 7168  # 205 MB of weights
TOKENS, HIDDEN, HEADS, LAYERS, WORDS = 16, 256, 4, 6, 10_000


def perceptron():
    """A layer of 205 MB, x FP32 [-1,WIDTH] -> y of the same shape: one row reads all weights once."""
    x = model_zoo.parameter("x", (-1, WIDTH), Type.f32)
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
    return model_zoo.model_of({"y": opset15.relu(_linear(x, weights))}, [x])


def _linear(x, weights):
    return opset15.matmul(x, opset15.constant(weights), False, True)


def encoder():
    """A transformer for short texts, tokens INT64 [-1,TOKENS] -> embedding FP32 [-1,HIDDEN]."""
    generator = np.random.default_rng(0)

    def dense(x, inputs, outputs):
        return _linear(x, generator.standard_normal((outputs, inputs), np.float32) / inputs**0.5)

    def normalize(x):
        return opset15.mvn(x, opset15.constant([2]), True, 1e-6, "inside_sqrt")

    def split(x):
        heads = opset15.reshape(x, opset15.constant([0, 0, HEADS, HIDDEN // HEADS]), True)
        return opset15.transpose(heads, opset15.constant([0, 2, 1, 3]))

    tokens = model_zoo.parameter("tokens", (-1, TOKENS), Type.i64)
    table = opset15.constant(generator.standard_normal((WORDS, HIDDEN), np.float32))
    x = opset15.gather(table, tokens, opset15.constant(0))
    for _ in range(LAYERS):
        query, key, value = (split(dense(x, HIDDEN, HIDDEN)) for _ in range(3))
        scores = opset15.multiply(opset15.matmul(query, key, False, True), opset15.constant(np.float32(0.125)))
        mixed = opset15.transpose(
            opset15.matmul(opset15.softmax(scores, 3), value, False, False), opset15.constant([0, 2, 1, 3])
        )
        merged = opset15.reshape(mixed, opset15.constant([0, 0, HIDDEN]), True)
        x = normalize(opset15.add(x, dense(merged, HIDDEN, HIDDEN)))
        wide = opset15.gelu(dense(x, HIDDEN, 4 * HIDDEN), "tanh")
        x = normalize(opset15.add(x, dense(wide, 4 * HIDDEN, HIDDEN)))
    return model_zoo.model_of({"embedding": opset15.reduce_mean(x, opset15.constant([1]), False)}, [tokens])


def binary(array, name, datatype):
    """Make a request with one row, binary in and out: body and headers."""
    tensor = {"name": name, "datatype": datatype, "shape": list(array.shape)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + array.tobytes(), {"Inference_Header_Content_Length": str(len(head))}


def main():
    """Measure and print the tables."""
    seconds, rounds = arguments(5, 3)
    print(f"{machine()}; {rounds} rounds of {seconds} s")
    generator = np.random.default_rng(1)
    relu = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, -2, 3, -4]}]}
    cases = {
        "perceptron": (perceptron(), binary(generator.standard_normal((1, WIDTH), np.float32), "x", "FP32")),
        "encoder": (encoder(), binary(generator.integers(0, WORDS, (1, TOKENS)), "tokens", "INT64")),
        "relu": (model_zoo.relu(), (json.dumps(relu).encode(), {})),
    }
    with tempfile.TemporaryDirectory() as name:
        directory, entries = Path(name), []
        for model, (made, _) in cases.items():
            model_zoo.save(made, directory / model)
            entry = {"name": model, "base_path": model}
            entries += [entry, {**entry, "name": f"{model}_batched", "max_batch_size": LIMIT}]
        with serve(directory, "-w", str(WORKERS), config=write_config(directory, *entries)) as service:
            service.wait_for_workers(WORKERS)
            for connections in (CONNECTIONS, 1):
                print(
                    f"\n| {connections} connections | alone: requests/s | median ms | p99 ms | batched: requests/s | "
                    "median ms | p99 ms | rate | median | p99 |\n|---|---|---|---|---|---|---|---|---|---|"
                )
                for model, (_, (body, headers)) in cases.items():
                    results = {model: [], f"{model}_batched": []}
                    for served in results:
                        load(service, directory, f"/v2/models/{served}/infer", body, connections, 1, **headers)
                    for _ in range(rounds):
                        for served, loads in results.items():
                            path = f"/v2/models/{served}/infer"
                            loads.append(load(service, directory, path, body, connections, seconds, **headers))
                    alone, batched = map(mean, results.values())
                    figures = " | ".join(
                        f"{each.rate:.0f} | {each.median:.2f} | {each.p99:.2f}" for each in (alone, batched)
                    )
                    print(
                        f"| {model} | {figures} | {batched.rate / alone.rate:.2f} | "
                        f"{batched.median / alone.median:.3f} | {batched.p99 / alone.p99:.2f} |"
                    )
                    counts = service.get(f"/v2/models/{model}_batched/stats").json()["model_stats"][0]
                    rows = counts["inference_count"] / counts["execution_count"]
                    print(f"<!-- {rows:.1f} rows per inference so far -->")


if __name__ == "__main__":
    main()
