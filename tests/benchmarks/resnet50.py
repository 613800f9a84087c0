"""ResNet-50 served by two workers against OpenVINO alone in two forked processes, and the memory of a worker.

    PYTHONPATH=tests/helpers python tests/benchmarks/resnet50.py [SECONDS [ROUNDS]]

Needs wrk (Debian: apt-get install wrk). The model has ResNet-50's shape and random weights.
"""

import json
import tempfile
from pathlib import Path

import model_zoo
import numpy as np
from measure import arguments, cores, infer_bare, load, machine, mean, pss_megabytes
from service import serve, write_config

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.runtime import Model

PATH = "/v2/models/resnet50/infer"
WORKERS = 2


def requests(image):
    """Make the requests for an image by name: body and headers."""
    tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape)}
    head = json.dumps({"inputs": [tensor]}).encode()
    flat = json.dumps({"inputs": [{**tensor, "data": image.ravel().tolist()}]}).encode()
    nested = json.dumps({"inputs": [{**tensor, "data": image.tolist()}]}).encode()
    return {
        "binary": (head + image.tobytes(), {"Inference_Header_Content_Length": str(len(head))}),
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
        service.wait_for(lambda: len(service.workers()) == WORKERS)
        for _ in range(rounds):
            results["OpenVINO alone"].append(infer_bare(model, {"image": image}, WORKERS, seconds))
            for name, (body, headers) in cases.items():
                results[name].append(load(service, directory, PATH, body, 2 * WORKERS, seconds, **headers))
    bare = mean(results["OpenVINO alone"])
    print(f"\n| {WORKERS} workers | requests/s | of bare | with what wrk took | CPU ms/request | of bare |")
    print("|---|---|---|---|---|---|")
    for name, loads in results.items():
        rate, cpu, taken = mean(loads)
        alone = rate * cores() / (cores() - taken)
        print(
            f"| {name} | {rate:.1f} | {rate / bare.rate:.2f} | {alone / bare.rate:.2f} | {cpu:.1f} "
            f"| {cpu / bare.cpu:.2f} |"
        )


def measure_memory(directory, config, seconds):
    """Print the memory of all processes with few and with more workers that have all inferred."""
    image = np.zeros((1, 3, 224, 224), np.float32)
    body, headers = requests(image)["binary"]
    sizes = {}
    for workers in (2, 6):
        with serve(directory, "-w", str(workers), config=config) as service:
            service.wait_for(lambda workers=workers: len(service.workers()) == workers)
            load(service, directory, PATH, body, 2 * workers, seconds, **headers)
            sizes[workers] = pss_megabytes([service.process.pid, *service.workers()])
    weights = (directory / "resnet50" / "1" / "model.bin").stat().st_size / 2**20
    further = (sizes[6] - sizes[2]) / 4
    print("\n| memory (PSS) | MB |\n|---|---|")
    print(f"| weights of the model | {weights:.0f} |")
    print(f"| arbiter and 2 workers | {sizes[2]:.0f} |\n| arbiter and 6 workers | {sizes[6]:.0f} |")
    print(f"| each further worker | {further:.1f}, {further / weights:.0%} of the weights |")


def main():
    """Measure and print the tables."""
    seconds, rounds = arguments(10, 3)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model_zoo.save(model_zoo.resnet50(), directory / "resnet50")
        config = write_config(directory, {"name": "resnet50", "base_path": "resnet50"})
        print(f"{machine()}; {rounds} rounds of {seconds} s")
        measure_speed(directory, config, seconds, rounds)
        measure_memory(directory, config, seconds)


if __name__ == "__main__":
    main()
