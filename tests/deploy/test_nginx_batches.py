"""A request that crashes the batch that it is in, through nginx: the others of the batch get their answers."""

import json
import re
import threading

import model_zoo
import nginx
import pytest
import slow_models
from openvino import Type, opset15
from service import serve

pytestmark = pytest.mark.skipif(
    nginx.PROGRAM is None or not (nginx.DEBIAN / "nginx.conf").exists(), reason="Debian's package nginx is missing"
)

# A model cannot be made to crash by a value, so its inference reads address 0 for one.
CONF = """
import ctypes
from ovms_rest.arbiter.gunicorn_settings import *
from ovms_rest.models.runtime import Model

_infer = Model._infer

def _crash(self, arrays):
    if self.metadata.name == "batched" and (arrays["x"] == 666).any():
        ctypes.string_at(0)
    return _infer(self, arrays)

Model._infer = _crash
"""


def identity():
    x = model_zoo.parameter("x", (-1, -1), Type.f32)
    return model_zoo.model_of({"y": opset15.relu(x)}, [x])


def request(*values):
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": list(values)}]}


def test_innocent_requests_of_a_batch_that_crashes_get_their_answers(tmp_path):
    (tmp_path / "conf.py").write_text(CONF)
    models = {"batched": identity(), "counting": slow_models.counting()}
    batched = {"plugin_config": {"INFERENCE_PRECISION_HINT": "f32"}, "max_batch_size": 16}
    config = model_zoo.save_all(tmp_path, models, lambda name: batched if name == "batched" else {})
    bind = ("-b", "127.0.0.1:0", "-b", f"unix:{tmp_path}/data.sock")
    with (
        serve(tmp_path, "-c", f"{tmp_path}/conf.py", "-w", "1", bind=bind, config=config,
              OVMS_REST_CONTROL_BIND=f"unix:{tmp_path}/control.sock", OVMS_REST_METRICS_ENABLE="true") as service,
        nginx.run(tmp_path / "nginx", tmp_path, "http") as running,
    ):  # fmt: skip
        service.wait_for_workers(2)
        answers = {}

        def ask(name, model, body):
            answers[name] = running.infer(model, body, X_Request_ID=name)

        # They queue behind a long inference, and so are inferred together.
        clients = [threading.Thread(target=ask, args=("long", "counting", slow_models.count(20 * slow_models.SLOW)))]
        clients[0].start()
        service.wait_for(lambda: is_busy(running.operators))
        for number in range(8):
            value = 666 if number == 3 else number
            clients.append(threading.Thread(target=ask, args=(f"r{number}", "batched", request(value, 1))))
            clients[-1].start()
        for client in clients:
            client.join()
        assert "during an inference with 'batched/1' (name and version), a batch of 8 requests, " in service.log
        assert answers.pop("long").status == 200
        guilty = answers.pop("r3")
        assert guilty.status == 500
        assert "the worker that ran request 'r3' died of SIGSEGV" in guilty.json()["error"]
        assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(answers, 200), service.log
        for name, answer in answers.items():
            assert json.loads(answer.body)["outputs"][0]["data"] == [float(name[1:]), 1]
        assert service.log.count("died of SIGSEGV during") == 2, "once in the batch and once alone"
        assert "request 'r3' alone; refused for 60 s" in service.log


def is_busy(operators):
    """Return whether a worker infers, by the metrics of the control worker."""
    return re.search(r"^ovms_rest_worker_busy\{.*\} 1", operators.get("/metrics").body.decode(), re.MULTILINE)
