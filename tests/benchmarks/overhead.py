"""The cost of the HTTP side of a request: our worker against gunicorn's `sync`, and with many workers against few.

    PYTHONPATH=tests/helpers python tests/benchmarks/overhead.py [SECONDS [ROUNDS]]

CPU time of the workers per request. Needs wrk (Debian: apt-get install wrk).
"""

from contextlib import ExitStack

import model_zoo
import numpy as np
from measure import benchmark, load, mean, pack_array, print_header, print_row
from raw_http import RELU
from service import serve

CONNECTIONS = 4
IMAGE = (1, 3, 224, 224)


def requests():
    """Return model, body and headers of the requests by name."""
    image = np.random.default_rng(0).standard_normal(IMAGE, np.float32)
    return {
        "4 floats, JSON": ("relu", RELU, {}),
        "602 KB in and out, binary": ("image", *pack_array(image)),
    }


def compare(directory, config, cases, servers, connections, seconds, rounds):
    """Print a row for every case, measured with two servers, given by name and arguments."""
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
            figures = (first.rate, first.cpu * 1e3, second.rate, second.cpu * 1e3)
            print_row(case, *(f"{figure:.0f}" for figure in figures), f"{second.cpu / first.cpu:.2f}")


def main():
    with benchmark(5, 4) as (directory, seconds, rounds):
        config = model_zoo.save_all(directory, {"relu": model_zoo.relu(), "image": model_zoo.relu(IMAGE)})
        cases, figures = requests(), ("requests/s", "CPU us")
        columns = [f"{server}: {figure}" for server in ("sync", "ours") for figure in figures]
        print_header("2 workers, 4 connections", *columns, "CPU / sync")
        compare(directory, config, cases, {"sync": (2, "-k", "sync"), "ours": (2,)}, CONNECTIONS, seconds, rounds)
        print()
        columns = [f"{server}: {figure}" for server in ("2 workers", "32 workers") for figure in figures]
        print_header("32 connections", *columns, "CPU / 2 workers")
        few = dict([next(iter(cases.items()))])
        compare(directory, config, few, {"few": (2,), "many": (32,)}, 32, seconds, rounds)


if __name__ == "__main__":
    main()
