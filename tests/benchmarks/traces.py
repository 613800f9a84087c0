"""The cost of traces: CPU of the worker per request without them, with a `traceparent` alone, and with spans.

    PYTHONPATH=tests/helpers python tests/benchmarks/traces.py [SECONDS [ROUNDS]]

One worker, a 4-float JSON request, 4 connections, a collector that takes all spans. The process that sends spans is
measured apart: its CPU per request, and the part of the spans that was dropped. Needs wrk (Debian: apt-get install
wrk).
"""

import re
from contextlib import ExitStack
from pathlib import Path

import model_zoo
from collector import collecting
from measure import benchmark, cpu_seconds, load, mean, print_header, print_row
from raw_http import RELU
from service import serve

PATH = "/v2/models/relu/infer"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


def is_sender(pid):
    return b"ovms_rest.tracing.sender" in Path(f"/proc/{pid}/cmdline").read_bytes()


def dropped(service):
    """Return the part of the spans that was dropped."""
    text = service.get("/metrics").body.decode()
    sent, *others = (float(count) for count in re.findall(r"^ovms_rest_spans_\S+ (\S+)$", text, re.MULTILINE))
    return sum(others) / max(sent + sum(others), 1)


def main():
    with benchmark(3, 4) as (directory, seconds, rounds), collecting() as collector, ExitStack() as stack:
        config = model_zoo.save_all(directory, {"relu": model_zoo.relu()})
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OVMS_REST_METRICS_ENABLE": "true"}
        services = {}
        for name, more in (("off", {}), ("on", variables)):
            (directory / name).mkdir()
            services[name] = stack.enter_context(serve(directory / name, "-w", "1", config=config, **more))
        services["on"].wait_for(lambda: any(map(is_sender, services["on"].workers())))
        (sender,) = filter(is_sender, services["on"].workers())
        services["on"].workers = lambda: [pid for pid in type(services["on"]).workers(services["on"]) if pid != sender]
        cases = {
            "without traces": ("off", {}),
            "without traces, with traceparent": ("off", {"traceparent": f"{TRACE}-01"}),
            "with traces, not sampled": ("on", {"traceparent": f"{TRACE}-00"}),
            "with traces, sampled": ("on", {"traceparent": f"{TRACE}-01"}),
        }
        results = {case: [] for case in cases}
        spent = requests = 0
        for _ in range(rounds):
            for case, (name, headers) in cases.items():
                before = cpu_seconds([sender])
                results[case].append(load(services[name], directory, PATH, RELU, 4, seconds, **headers))
                if case == "with traces, sampled":
                    spent += cpu_seconds([sender]) - before
                    requests += results[case][-1].rate * seconds
        print_header("case", "CPU us per request", "/ without traces")
        base = mean(results["without traces"]).cpu
        for case, loads in results.items():
            print_row(case, f"{mean(loads).cpu * 1e3:.1f}", f"{mean(loads).cpu / base:.3f}")
        print(f"\nThe sender: {spent / requests * 1e6:.0f} us per request; {dropped(services['on']):.0%} dropped")


main()
