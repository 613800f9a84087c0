"""ResNet-50 served by two workers against OpenVINO alone in two forked processes, and the memory of a worker.

    PYTHONPATH=tests/helpers python tests/benchmarks/resnet50.py [SECONDS [ROUNDS]]

Needs wrk (Debian: apt-get install wrk). The model has ResNet-50's shape and random weights.
"""

import json

import model_zoo
import numpy as np
from measure import benchmark, cores, infer_bare, load, mean, pack_array, print_header, print_row, pss_megabytes
from service import serve

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.runtime import Model

PATH = "/v2/models/resnet50/infer"
WORKERS = 2


def requests(image):
    """Return body and headers of the requests for an image, by name."""
    tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape)}
    flat = json.dumps({"inputs": [{**tensor, "data": image.ravel().tolist()}]}).encode()
    nested = json.dumps({"inputs": [{**tensor, "data": image.tolist()}]}).encode()
    return {
        "binary": pack_array(image, "image"),
        "JSON, flat": (flat, {}),
        "JSON, nested": (nested, {}),
    }


def measure_speed(directory, config, seconds, rounds):
    """Print rates and CPU times, each case in turn with OpenVINO alone."""
    image = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    model = Model("resnet50", 1, directory / "resnet50" / "1" / "model.xml", plan_compilation("CPU", {}, WORKERS))
    model.compile()
    cases = requests(image)
    results = {name: [] for name in ("OpenVINO alone", *cases)}
    with serve(directory, "-w", str(WORKERS), config=config) as service:
        service.wait_for_workers(WORKERS)
        for _ in range(rounds):
            results["OpenVINO alone"].append(infer_bare(model, {"image": image}, WORKERS, seconds))
            for name, (body, headers) in cases.items():
                results[name].append(load(service, directory, PATH, body, 2 * WORKERS, seconds, **headers))
    bare = mean(results["OpenVINO alone"])
    print_header(f"{WORKERS} workers", "requests/s", "of bare", "without wrk's share", "CPU ms/request", "of bare")
    for name, loads in results.items():
        rate, cpu, taken, *_ = mean(loads)
        alone = rate * cores() / (cores() - taken)
        shares = (f"{rate / bare.rate:.2f}", f"{alone / bare.rate:.2f}")
        print_row(name, f"{rate:.1f}", *shares, f"{cpu:.1f}", f"{cpu / bare.cpu:.2f}")


def measure_memory(directory, config, seconds):
    """Print the memory with few and with more workers, all of which have inferred."""
    image = np.zeros((1, 3, 224, 224), np.float32)
    body, headers = requests(image)["binary"]
    sizes = {}
    for workers in (2, 6):
        with serve(directory, "-w", str(workers), config=config) as service:
            service.wait_for_workers(workers)
            load(service, directory, PATH, body, 2 * workers, seconds, **headers)
            sizes[workers] = pss_megabytes([service.process.pid, *service.workers()])
    weights = (directory / "resnet50" / "1" / "model.bin").stat().st_size / 2**20
    further = (sizes[6] - sizes[2]) / 4
    print()
    print_header("memory (PSS)", "MB")
    print_row("weights of the model", f"{weights:.0f}")
    for workers, size in sizes.items():
        print_row(f"arbiter and {workers} workers", f"{size:.0f}")
    print_row("each further worker", f"{further:.1f}, {further / weights:.0%} of the weights")


def main():
    with benchmark(10, 3) as (directory, seconds, rounds):
        config = model_zoo.save_all(directory, {"resnet50": model_zoo.resnet50()})
        measure_speed(directory, config, seconds, rounds)
        measure_memory(directory, config, seconds)


if __name__ == "__main__":
    main()
