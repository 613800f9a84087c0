"""The OpenAPI document of a running service: valid, with every route, and with examples that work as they are."""

import json
import subprocess
from urllib.parse import quote

import falcon.inspect
import falcon.testing
import model_zoo
import pytest
from openapi_spec_validator import validate
from service import serve, write_config

from ovms_rest.app import load_app
from ovms_rest.errors import LoadError

from openvino import Type, opset15  # isort: skip

ODD_NAME = "a b.c'd\"e{f}%2Fé?#"
NODE = """
import numpy as np
def inputs(params): return {"picture": ("FP32", [1, -1, -1, 3])}
def outputs(params): return {"mean": ("FP32", [1])}
def execute(inputs, params):
    picture = inputs["picture"]
    assert picture.shape[1] >= 32, "too small"
    return {"mean": picture.mean().reshape(1)}
"""
CRASH = NODE.replace("picture =", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV); picture =")
EMPTY = """
import numpy as np
def inputs(params): return {"x": ("FP32", [-1, 4])}
def outputs(params): return {"rows": ("FP32", [-1, 1, 4])}
def execute(inputs, params):
    return {"rows": np.zeros((0, 1, 4), np.float32)}
"""


def image_model(shape=(-1, 224, 224, 3)):
    """Return a model picture FP32 -> mean of each channel."""
    picture = model_zoo.parameter("picture", shape, Type.f32)
    return model_zoo.model_of({"mean": opset15.reduce_mean(picture, opset15.constant([1, 2]), False)}, [picture])


def labelled():
    """Return a model x FP32 [-1,3] -> scores of three classes."""
    model = model_zoo.relu((-1, 3))
    model.set_rt_info("cat dog bird", ["model_info", "labels"])
    return model


def node(name, library, tensor, output, count=None):
    """Return a custom node between the request and the response."""
    return {
        "name": name,
        "type": "custom",
        "library_name": library,
        "inputs": [{tensor: {"node_name": "request", "data_item": tensor}}],
        "outputs": [{"data_item": output, "alias": output}],
        **({} if count is None else {"demultiply_count": count}),
    }


def pipeline(name, library, tensor, output, count=None, **keys):
    """Return a pipeline of a custom node alone."""
    nodes, outputs = [node("n", library, tensor, output, count)], [{output: {"node_name": "n", "data_item": output}}]
    return {"name": name, "inputs": [tensor], "nodes": nodes, "outputs": outputs, **keys}


def model_pipeline(name, model, tensor, output, **keys):
    """Return a pipeline of a model alone."""
    nodes = [
        {
            "name": "n",
            "type": "DL model",
            "model_name": model,
            "inputs": [{tensor: {"node_name": "request", "data_item": tensor}}],
            "outputs": [{"data_item": output, "alias": output}],
        }
    ]
    outputs = [{output: {"node_name": "n", "data_item": output}}]
    return {"name": name, "inputs": [tensor], "nodes": nodes, "outputs": outputs, **keys}


def save_models(directory):
    """Save models of all kinds and their pipelines; return the config."""
    every = {name: (element_type, (-1, 2)) for name, element_type in model_zoo.ELEMENT_TYPES.items()}
    models = {
        ODD_NAME: (model_zoo.relu(), {}),
        "add": (model_zoo.add(), {}),
        "types": (model_zoo.passthrough(**every), {}),
        "scalar": (model_zoo.relu(()), {}),
        "strings": (model_zoo.strings(), {}),
        "matrix": (model_zoo.matrix(), {}),
        "product": (model_zoo.product(), {}),
        "split": (model_zoo.split(), {"trial": "request.json"}),
        "image": (image_model(), {"layout": "NHWC"}),
        "static": (image_model((1, 224, 224, 3)), {"layout": "NHWC", "color_format": "RGB:BGR"}),
        "planar": (model_zoo.relu((1, 3, 224, 224)), {}),
        "ranged": (model_zoo.relu(), {"shape": "(1:8,4)"}),
        "labelled": (labelled(), {}),
        "threaded": (model_zoo.relu((2, 3)), {"plugin_config": {"INFERENCE_NUM_THREADS": 2}}),
        "untried": (model_zoo.relu(), {"trial": False}),
        "own": (model_zoo.relu(), {"example": "own.json"}),
        "wrong": (model_zoo.relu(), {"example": "wrong.json"}),
        "versions": (model_zoo.relu(), {"model_version_policy": {"all": {}}}),
    }
    configs = [{"name": "broken", "base_path": "nothing"}]
    for index, (name, (model, keys)) in enumerate(models.items()):
        base = directory / f"model{index}"
        model_zoo.save(model, base)
        configs.append({"name": name, "base_path": base.name, **keys})
    model_zoo.save(model_zoo.relu((-1, 2)), directory / f"model{list(models).index('versions')}", 3)
    lengths = {"name": "lengths", "datatype": "INT64", "shape": [2], "data": [2, 4]}
    x = {"name": "x", "datatype": "FP32", "shape": [6], "data": [0, 1, 2, 3, 4, 5]}
    request = directory / f"model{list(models).index('split')}" / "1" / "request.json"
    request.write_text(json.dumps({"inputs": [x, lengths]}))
    own = {"id": "mine", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [[1.5, -2, 3, 4]]}]}
    (directory / "own.json").write_text(json.dumps(own))
    (directory / "wrong.json").write_text(json.dumps({"inputs": [{**own["inputs"][0], "shape": [2, 4]}]}))
    small = {"name": "picture", "datatype": "FP32", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    (directory / "small.json").write_text(json.dumps({"inputs": [small]}))
    libraries = {"node": NODE, "crash": CRASH, "empty": EMPTY}
    for name, code in libraries.items():
        (directory / f"{name}.py").write_text(code)
    return write_config(
        directory,
        *configs,
        custom_node_library_config_list=[{"name": name, "base_path": f"{name}.py"} for name in libraries],
        pipeline_config_list=[
            model_pipeline("of one", "labelled", "x", "y"),
            model_pipeline("of image", "static", "picture", "mean"),
            model_pipeline("of shards", "static", "picture", "mean", demultiply_count=2),
            model_pipeline("with own", "own", "x", "y", example="own.json"),
            model_pipeline("of threads", "threaded", "x", "y"),
            pipeline("of code", "node", "picture", "mean"),
            pipeline("of small", "node", "picture", "mean", example="small.json"),
            pipeline("untried code", "node", "picture", "mean", example=False),
            pipeline("of crash", "crash", "picture", "mean"),
            pipeline("of nothing", "empty", "x", "rows", -1),
        ],
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("openapi")
    with serve(directory, "-w", "1", config=save_models(directory), OVMS_REST_METRICS_ENABLE="true") as running:
        yield running


@pytest.fixture(scope="module")
def document(served):
    answer = served.get("/v2/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    return answer.json()


def path_of(name, version=None):
    return f"/v2/models/{quote(name, safe='')}{f'/versions/{version}' if version else ''}/infer"


def operation(document, name, version=None):
    return document["paths"][path_of(name, version)]["post"]


def content(document, name):
    return operation(document, name)["requestBody"]["content"]


def described(document, name, version=None):
    return operation(document, name, version)["x-ovms-rest"]


def example(document, name):
    return content(document, name)["application/json"].get("example")


# --- The document


def test_the_document_is_valid(document):
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_route_is_in_the_document(document):
    app = load_app({})
    for route in falcon.inspect.inspect_compiled_router(app._router):
        if route.path.startswith("/console/") and "." in route.path:  # a file of the console
            continue
        methods = {method.method.lower() for method in route.methods if not method.internal} - {"head"}
        assert methods <= set(document["paths"].get(route.path, {})), f"{route.path} has no row in openapi_routes.py"
    assert "/v2/models/{name}/infer" in document["paths"]


def test_the_document_has_an_etag(served):
    first = served.get("/v2/openapi.json")
    etag = first.headers["etag"]
    for tags in (etag, f'"other", W/{etag}', "*"):
        again = served.request("GET", "/v2/openapi.json", headers={"If-None-Match": tags})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    assert served.request("GET", "/v2/openapi.json", headers={"If-None-Match": '"other"'}).body == first.body
    head = served.request("HEAD", "/v2/openapi.json")
    assert (head.status, head.body, head.headers["etag"]) == (200, b"", etag)


def test_the_entry_points_name_the_document(served):
    assert "GET /v2/openapi.json" in served.get("/").json()["routes"].values()


# --- Models


def test_every_served_model_has_a_path_with_its_tensors(served, document):
    served_models = [model["name"] for model in served.get("/v2/models").json()["models"] if model["name"] != "broken"]
    assert ODD_NAME in served_models
    assert "of code" in served_models
    for name in served_models:
        metadata = served.get(f"/v2/models/{quote(name, safe='')}").json()
        found = described(document, name)
        assert (found["model"], found["version"]) == (name, metadata["versions"][-1])
        for kind in ("inputs", "outputs"):
            tensors = [
                {
                    "name": tensor["name"],
                    "datatype": tensor["datatype"],
                    "shape": [dim if isinstance(dim, int) else -1 for dim in tensor["shape"]],
                }
                for tensor in found[kind]
            ]
            assert tensors == metadata[kind]


def test_a_model_that_does_not_serve_has_no_path(served, document):
    assert b"broken" in served.get("/v1/config").body
    assert "broken" not in json.dumps(document)


def test_every_version_has_a_path_where_several_serve(document):
    assert described(document, "versions")["version"] == "3"
    assert described(document, "versions", 1)["inputs"][0]["shape"] == ["-1", 4]
    assert described(document, "versions", 3)["inputs"][0]["shape"] == ["-1", 2]
    assert path_of("add", 1) not in document["paths"]


def test_the_extension_describes_a_model(document):
    assert described(document, "static") == {
        "model": "static",
        "version": "1",
        "kind": "model",
        "inputs": [
            {
                "name": "picture",
                "datatype": "FP32",
                "shape": [1, 224, 224, 3],
                "layout": "NHWC",
                "image": {"height": 224, "width": 224, "channels": 3, "color": "BGR"},
            }
        ],
        "outputs": [{"name": "mean", "datatype": "FP32", "shape": [1, 3]}],
        "compiled": {
            "target_device": "CPU",
            "NUM_STREAMS": "0",
            "INFERENCE_NUM_THREADS": "1",
            "ENABLE_CPU_PINNING": "false",
        },
    }
    assert described(document, "ranged")["inputs"][0]["shape"] == ["1:8", 4]
    assert "image" not in described(document, "planar")["inputs"][0]
    assert described(document, "labelled")["outputs"][0]["labels"] == ["cat", "dog", "bird"]


def test_the_extension_describes_a_pipeline(document):
    found = described(document, "of code")
    assert (found["kind"], found["compiled"], found["nodes"]) == ("pipeline", {}, [{"name": "n", "type": "custom"}])
    image = {"height": None, "width": None, "channels": 3, "color": "BGR"}
    assert found["inputs"] == [{"name": "picture", "datatype": "FP32", "shape": [1, "-1", "-1", 3], "image": image}]
    assert described(document, "of one")["outputs"][0]["labels"] == ["cat", "dog", "bird"]
    assert described(document, "of one")["nodes"] == [{"name": "n", "type": "DL model", "model": "labelled"}]


# --- Examples


def test_every_example_works_when_it_is_sent_as_it_is(served, document):
    sent = []
    for path, methods in document["paths"].items():
        for method, found in methods.items():
            body = found.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "example" in body:
                assert len(json.dumps(body["example"])) <= 8192
                answer = served.request(method.upper(), path, body["example"])
                assert answer.status == (204 if path == path_of("of nothing") else 200), (path, answer.body)
                sent.append(path)
    missing = set(document["paths"]) - set(sent)
    assert {path for path in missing if path.endswith("/infer") and "{" not in path} == {
        path_of(name) for name in ("planar", "untried", "untried code", "of crash", "of small", "of threads")
    }


def test_an_example_is_the_request_of_the_trial(document):
    assert example(document, "split")["inputs"] == [
        {"name": "lengths", "datatype": "INT64", "shape": [2], "data": [2, 4]},
        {"name": "x", "datatype": "FP32", "shape": [6], "data": [0, 1, 2, 3, 4, 5]},
    ]


def test_an_example_is_the_request_in_the_file_that_the_config_names(document):
    for name in ("own", "with own"):
        assert example(document, name)["id"] == "mine"


def test_a_file_that_does_not_fit_the_model_is_replaced_by_a_generated_example(served, document):
    assert example(document, "wrong")["inputs"][0]["shape"] == [1, 4]
    assert "model 'wrong' version 1: its example is left out: inputs[0] 'x': data has 4 elements" in served.log


def test_a_large_input_that_takes_images_has_a_small_picture_as_its_example(served, document):
    for name, images in (("image", 1), ("static", 1), ("of image", 1), ("of shards", 2)):
        (item,) = example(document, name)["inputs"]
        assert (item["datatype"], item["shape"], len(item["data"])) == ("BYTES", [images], images)
        assert list(item["data"][0]) == ["b64"]


def test_a_large_input_without_images_has_a_command_that_sends_it_in_binary(served, document):
    text = operation(document, "planar")["description"]
    (command,) = (line.strip() for line in text.splitlines() if line.startswith("    "))
    assert "602112 /dev/zero" in command
    command = command.replace("http://localhost:8000", f"http://127.0.0.1:{served.port}")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["outputs"][0]["shape"] == [1, 3, 224, 224]


def test_a_node_that_crashes_with_generated_inputs_serves_all_the_same(served, document):
    assert served.get("/v2/models/of%20crash/ready").status == 200
    assert described(document, "of crash")["kind"] == "pipeline"


def test_an_example_that_the_pipeline_does_not_compute_is_left_out(served, document):
    assert example(document, "of small") is None
    assert "pipeline 'of small' does not compute its example, which is left out" in served.log


# --- When it is made


def test_a_worker_that_gives_up_a_version_makes_the_document_again(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    app = load_app({"OVMS_REST_CONFIG": str(write_config(tmp_path, {"name": "m", "base_path": "relu"}))})
    entry = app.models.entries["m"]

    def paths_of_a_worker():
        app.open(0, False, lambda label: None, lambda: None)
        return falcon.testing.TestClient(app).simulate_get("/v2/openapi.json").json["paths"]

    assert "/v2/models/m/infer" in paths_of_a_worker()
    entry.versions[1].open = refuse
    assert "/v2/models/m/infer" not in paths_of_a_worker()


def refuse(retire):
    raise LoadError("has no room")


def test_the_document_follows_the_registry_of_a_new_generation(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    config = write_config(tmp_path, {"name": "one", "base_path": "relu"})
    with serve(tmp_path, "-w", "1", config=config) as running:
        before = running.get("/v2/openapi.json").json()["paths"]
        write_config(tmp_path, {"name": "two", "base_path": "relu"})
        assert running.request("POST", "/v1/config/reload", b"").status == 201
        after = running.get("/v2/openapi.json").json()["paths"]
    assert [path for path in before if path not in after] == ["/v2/models/one/infer"]
    assert [path for path in after if path not in before] == ["/v2/models/two/infer"]
