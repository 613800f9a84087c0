"""What the HTTP side of a request costs: our worker against gunicorn's `sync`, and with many workers against few.

    PYTHONPATH=tests python tests/benchmarks/overhead.py [SECONDS [ROUNDS]]

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

PATH = "/v2/models/relu/infer"
CONNECTIONS = 4


def requests():
    """Make the requests by name: body and headers."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    small = json.dumps({"inputs": [{**tensor, "data": [1, -2, 3, -4]}]}).encode()
    array = np.random.default_rng(0).standard_normal((37_632, 4), np.float32)
    large = {"inputs": [{**tensor, "shape": list(array.shape)}], "parameters": {"binary_data_output": True}}
    head = json.dumps(large).encode()
    return {
        "4 floats, JSON": (small, {}),
        "602 KB in and out, binary": (head + array.tobytes(), {"Inference_Header_Content_Length": str(len(head))}),
    }


def compare(directory, config, cases, servers, connections, seconds, rounds):
    """Print a row for every case: what two servers, by name and arguments, do with it."""
    with ExitStack() as stack:
        services = {}
        for name, (workers, *options) in servers.items():
            (directory / name).mkdir()
            context = serve(directory / name, "-w", str(workers), *options, config=config)
            services[name] = stack.enter_context(context)
            services[name].wait_for(lambda name=name, workers=workers: len(services[name].workers()) == workers)
        for case, (body, headers) in cases.items():
            results = {name: [] for name in services}
            for _ in range(rounds):
                for name, service in services.items():
                    results[name].append(load(service, directory, PATH, body, connections, seconds, **headers))
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
        model_zoo.save(model_zoo.relu(), directory / "relu")
        config = write_config(directory, {"name": "relu", "base_path": "relu"})
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
