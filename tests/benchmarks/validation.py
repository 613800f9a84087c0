"""The cost of matching a request with a model of two inputs.

    PYTHONPATH=tests/helpers python tests/benchmarks/validation.py [THOUSANDS_OF_REQUESTS [ROUNDS]]

CPU time of one process in the best round: in the others, the process only had more company.
"""

import time

import numpy as np
from measure import arguments, machine, print_header, print_row

from ovms_rest.protocol.tensors import Dim, InferenceRequest, ModelMetadata, Tensor, TensorMetadata
from ovms_rest.protocol.validation import validate_inputs, validate_outputs

DIMS = {
    "static": (Dim(1, 1), Dim(128, 128)),
    "dynamic": (Dim(0, None), Dim(0, None)),
    "ranged": (Dim(1, 16), Dim(16, 512)),
}


def main():
    thousands, rounds = arguments(100, 5)
    print(f"{machine()}; best of {rounds} rounds of {thousands},000\n")
    print_header("dims of the two inputs", "us/request")
    array = np.zeros((1, 128), np.int64)
    request = InferenceRequest((Tensor("input_ids", "INT64", array), Tensor("attention_mask", "INT64", array)))
    outputs = {"logits": TensorMetadata("logits", "FP32", None)}
    for kind, dims in DIMS.items():
        inputs = {name: TensorMetadata(name, "INT64", dims) for name in ("attention_mask", "input_ids")}
        metadata = ModelMetadata("m", "1", inputs, outputs)
        times = []
        for _ in range(rounds):
            started = time.process_time()
            for _ in range(thousands * 1000):
                validate_inputs(request, metadata)
                validate_outputs(request, metadata)
            times.append(time.process_time() - started)
        print_row(kind, f"{min(times) / thousands * 1e3:.2f}")


if __name__ == "__main__":
    main()
