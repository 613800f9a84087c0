"""The distribution of work: kept-alive connections over workers, and health while every worker is busy.

    PYTHONPATH=tests/helpers python tests/benchmarks/scheduling.py [SECONDS [ROUNDS]]

Needs wrk (Debian: apt-get install wrk). The model takes some 20 ms of one core.
"""

import http.client
import json
import threading
import time

import model_zoo
import numpy as np
from measure import benchmark, infer_bare, load, mean, print_header, print_row
from openvino import Type, opset15
from service import free_port, serve, write_config

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.runtime import Model

PATH = "/v2/models/slow/infer"
MILLISECONDS = 20
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}).encode()


def chain(layers):
    """Make a model that multiplies matrices a number of times: x FP32 [1] -> y FP32 [256,1024]."""
    x = model_zoo.parameter("x", (1,), Type.f32)
    random = np.random.default_rng(0)
    data = opset15.multiply(x, opset15.constant(random.random((256, 1024), np.float32)))
    for _ in range(layers):
        weights = random.standard_normal((1024, 1024), np.float32) / np.float32(32)
        data = opset15.matmul(data, opset15.constant(weights), transpose_a=False, transpose_b=False)
    return model_zoo.model_of({"y": opset15.reduce_mean(data, np.int64([0, 1]), keep_dims=False)}, [x])


def make_slow_model(directory):
    """Save a model that takes about MILLISECONDS; return it compiled."""
    layers, model = 4, None
    for attempt in range(3):
        path = model_zoo.save(chain(layers), directory / f"slow{attempt}")
        model = Model("slow", 1, path / "1" / "model.xml", plan_compilation("CPU", {}, 2))
        model.compile()
        spent = infer_bare(model, {"x": np.ones(1, np.float32)}, 1, 1).cpu
        layers = max(1, round(layers * MILLISECONDS / spent))
    return model


def measure_balance(directory, config, seconds, rounds):
    """Print the rate of two workers against twice the rate of one."""
    rates = {1: [], 2: []}
    for _ in range(rounds):
        for workers, results in rates.items():
            with serve(directory, "-w", str(workers), config=config) as service:
                service.wait_for_workers(workers)
                results.append(load(service, directory, PATH, BODY, 4, seconds))
    one, two = (mean(results).rate for results in rates.values())
    print_header("4 kept-alive connections", "requests/s")
    print_row("1 worker", f"{one:.1f}")
    print_row("2 workers", f"{two:.1f}")
    print_row("2 workers / twice 1 worker", f"{two / one / 2:.2f}")


def measure_control(directory, config, model, seconds):
    """Print the times of health checks on both addresses while 8 clients keep two workers busy."""
    inference = infer_bare(model, {"x": np.ones(1, np.float32)}, 2, 2).cpu
    port = free_port()
    with serve(directory, "-w", "2", config=config, OVMS_REST_CONTROL_BIND=f"127.0.0.1:{port}") as service:
        service.wait_for_workers(3)
        loading = threading.Thread(target=load, args=(service, directory, PATH, BODY, 8, seconds + 2))
        loading.start()
        time.sleep(1)
        times = {name: [] for name in ("control address", "other address")}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name, asked in zip(times, (port, service.port), strict=True):
                connection = http.client.HTTPConnection("127.0.0.1", asked)
                started = time.perf_counter()
                connection.request("GET", "/v2/health/ready")
                assert connection.getresponse().read() == b""
                times[name].append((time.perf_counter() - started) * 1e3)
                connection.close()
        loading.join()
    print()
    print_header(f"health under load, ms (an inference takes {inference:.1f})", "median", "p99", "p99 / inference")
    for name, found in times.items():
        median, last = np.percentile(found, [50, 99])
        print_row(name, f"{median:.2f}", f"{last:.2f}", f"{last / inference:.2f}")


def main():
    with benchmark(8, 3) as (directory, seconds, rounds):
        model = make_slow_model(directory)
        config = write_config(directory, {"name": "slow", "base_path": str(model.file.parent.parent)})
        measure_balance(directory, config, seconds, rounds)
        measure_control(directory, config, model, seconds)


if __name__ == "__main__":
    main()
