"""The cost of the HTTP side of a request: our worker against gunicorn's `sync`, and with many workers against few.

    PYTHONPATH=tests/helpers python tests/benchmarks/overhead.py [SECONDS [ROUNDS]]

CPU time of the workers per request. Needs wrk (Debian: apt-get install wrk).
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import model_zoo
import numpy as np
from measure import arguments, load, machine, mean
from service import serve, write_config

CONNECTIONS = 4
IMAGE = (1, 3, 224, 224)


def requests():
    """Make the requests by name: model, body and headers."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    small = json.dumps({"inputs": [{**tensor, "data": [1, -2, 3, -4]}]}).encode()
    array = np.random.default_rng(0).standard_normal(IMAGE, np.float32)
    large = {"inputs": [{**tensor, "shape": list(array.shape)}], "parameters": {"binary_data_output": True}}
    head = json.dumps(large).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    return {
        "4 floats, JSON": ("relu", small, {}),
        "602 KB in and out, binary": ("image", head + array.tobytes(), length),
    }


def save_models(directory):
    """Write relu, of rows of 4, and image, a relu of 1x3x224x224; return a config of both."""
    models = {"relu": model_zoo.relu(), "image": model_zoo.relu(IMAGE)}
    for name, model in models.items():
        model_zoo.save(model, directory / name)
    return write_config(directory, *({"name": name, "base_path": name} for name in models))


def compare(directory, config, cases, servers, connections, seconds, rounds):
    """Print a row for every case: what two servers, by name and arguments, do with it."""
    with ExitStack() as stack:
        services = {}
        for name, (workers, *options) in servers.items():
            (directory / name).mkdir()
            context = serve(directory / name, "-w", str(workers), *options, config=config)
            services[name] = stack.enter_context(context)
            services[name].wait_for(lambda name=name, workers=workers: len(services[name].workers()) == workers)
        for case, (model, body, headers) in cases.items():
            path = f"/v2/models/{model}/infer"
            results = {name: [] for name in services}
            for _ in range(rounds):
                for name, service in services.items():
                    results[name].append(load(service, directory, path, body, connections, seconds, **headers))
            first, second = (mean(results[name]) for name in services)
            print(
                f"| {case} | {first.rate:.0f} | {first.cpu * 1e3:.0f} | {second.rate:.0f} | {second.cpu * 1e3:.0f} "
                f"| {second.cpu / first.cpu:.2f} |"
            )


def main():
    """Measure and print the tables."""
    seconds, rounds = arguments(5, 4)
    print(f"{machine()}; {rounds} rounds of {seconds} s")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = save_models(directory)
        cases = requests()
        print("\n| 2 workers, 4 connections | sync: requests/s | CPU us | ours: requests/s | CPU us | CPU / sync |")
        print("|---|---|---|---|---|---|")
        compare(directory, config, cases, {"sync": (2, "-k", "sync"), "ours": (2,)}, CONNECTIONS, seconds, rounds)
        print(
            "\n| 32 connections | 2 workers: requests/s | CPU us | 32 workers: requests/s | CPU us | CPU / 2 workers |"
        )
        print("|---|---|---|---|---|---|")
        few = dict([next(iter(cases.items()))])
        compare(directory, config, few, {"few": (2,), "many": (32,)}, 32, seconds, rounds)


if __name__ == "__main__":
    main()
