"""Pipelines in a whole service: OVMS's examples, reports of mistakes, changes and crashes."""

import json
import shutil
import struct
import subprocess

import cv2
import model_zoo
import numpy as np
import pytest
from node_cases import COMPILER, PYTHON_NODE, build_c_node
from openvino import Type, opset15
from service import serve, write_config
from tritonclient.http import InferenceServerClient, InferInput

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


# --- Definitions


def pairs(text):
    """Read "key=value key=value"."""
    return dict(pair.split("=") for pair in text.split())


def connections(text):
    """Read "tensor=node.item tensor=node.item"."""
    sources = {tensor: source.split(".") for tensor, source in pairs(text).items()}
    return [{tensor: {"node_name": node, "data_item": item}} for tensor, (node, item) in sources.items()]


def node(name, inputs, outputs, **more):
    """Make a node; inputs are "tensor=node.item", outputs "alias=tensor"."""
    aliases = [{"data_item": tensor, "alias": alias} for alias, tensor in pairs(outputs).items()]
    return {"name": name, "inputs": connections(inputs), "outputs": aliases, **more}


def model_node(name, model, inputs, outputs):
    return node(name, inputs, outputs, type="DL model", model_name=model)


def custom_node(name, library, inputs, outputs, **more):
    return node(name, inputs, outputs, type="custom", library_name=library, **more)


def pipeline(name, inputs, nodes, outputs, **more):
    return {"name": name, "inputs": inputs.split(), "nodes": nodes, "outputs": connections(outputs), **more}


# --- Models and nodes


def plus_one():
    """OVMS's dummy: b FP32 -> a = b + 1."""
    b = model_zoo.parameter("b", (1, 10), Type.f32)
    return model_zoo.model_of({"a": opset15.add(b, np.float32(1))}, [b])


def detector():
    """Image FP32 [1,3,8,8] -> detection [1,1,4,7]: as many boxes as its first pixel says, left to right."""
    image = model_zoo.parameter("image", (1, 3, 8, 8), Type.f32)
    rows = [[0, 1, 0.9, x / 8, 0.25, (x + 2) / 8, 0.75] for x in (0, 2, 4, 6)]
    boxes = opset15.constant(np.array(rows, np.float32).reshape(1, 1, 4, 7))
    number = opset15.reshape(opset15.slice(image, [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]), [1, 1, 1, 1], False)
    order = opset15.constant(np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1))
    is_there = opset15.convert(opset15.less(order, number), "f32")
    scale = opset15.concat(
        [opset15.broadcast(np.float32(1), [1, 1, 4, 2]), is_there, opset15.broadcast(np.float32(1), [1, 1, 4, 4])], 3
    )
    return model_zoo.model_of({"detection": opset15.multiply(boxes, scale)}, [image])


def mean_of_picture():
    """Image FP32 [1,3,4,4] -> mean [1,1]."""
    image = model_zoo.parameter("image", (1, 3, 4, 4), Type.f32)
    mean = opset15.reduce_mean(image, np.int64([1, 2, 3]), keep_dims=False)
    return model_zoo.model_of({"mean": opset15.reshape(mean, [1, 1], False)}, [image])


OPERATIONS = """
import numpy as np

def inputs(params):
    return {"input_numbers": ("FP32", [1, 10]), "op_factors": ("FP32", [1, 4])}

def outputs(params):
    return {"different_ops_results": ("FP32", [4, 1, 10])}

def execute(inputs, params):
    x, (add, subtract, multiply, divide) = inputs["input_numbers"], inputs["op_factors"][0]
    return {"different_ops_results": np.stack([x + add, x - subtract, x * multiply, x / divide])}
"""

MAXIMUM = """
import numpy as np

CHOICES = {"MAXIMUM_MINIMUM": np.min, "MAXIMUM_AVERAGE": np.mean, "MAXIMUM_MAXIMUM": np.max}

def inputs(params):
    return {"input_tensors": ("FP32", [-1, 1, 10])}

def outputs(params):
    return {"maximum_tensor": ("FP32", [1, 10])}

def execute(inputs, params):
    tensors = inputs["input_tensors"]
    scores = [CHOICES[params["selection_criteria"]](tensor) for tensor in tensors]
    return {"maximum_tensor": tensors[int(np.argmax(scores))]}
"""

CUSTOM = PYTHON_NODE.replace("[1, 2]", "[1, 10]")
FAILING = CUSTOM.replace('return {"y": inputs["x"] + 1}', 'raise ZeroDivisionError("a bug of the user\'s")')

DUMMY = model_node("n1", "dummy", "b=request.in", "x=a")
CHAIN = pipeline("chain", "in", [DUMMY, model_node("n2", "dummy", "b=n1.x", "x=a")], "out=n2.x")
ENSEMBLE = pipeline(
    "ensemble",
    "image",
    [
        model_node("both", "add", "left=one.y right=two.y", "label=sum"),
        model_node("one", "relu", "x=request.image", "y=y"),
        model_node("two", "relu", "x=request.image", "y=y"),
    ],
    "label=both.label first=one.y",
)
OPERATE = [
    custom_node(
        "operate",
        "operations",
        "input_numbers=request.numbers op_factors=request.factors",
        "results=different_ops_results",
        demultiply_count=4,
    ),
    model_node("dummy", "dummy", "b=operate.results", "x=a"),
]
ALL_RESULTS = pipeline("all_results", "numbers factors", OPERATE, "all=dummy.x before=operate.results")


def choose(kind):
    """Make a pipeline that gathers the operations' results and returns the best by its minimum, average or maximum."""
    params = {"selection_criteria": f"MAXIMUM_{kind.upper()}"}
    chosen = custom_node(
        "choose", "maximum", "input_tensors=dummy.x", "y=maximum_tensor", gather_from_node="operate", params=params
    )
    return pipeline(f"maximum_{kind}", "numbers factors", [*OPERATE, chosen], "best=choose.y")


VEHICLES = pipeline(
    "vehicles",
    "image",
    [
        model_node("detect", "detector", "image=request.image", "detection=detection"),
        custom_node(
            "extract",
            "object_detection",
            "image=request.image detection=detect.detection",
            "images=images coordinates=coordinates confidences=confidences",
            demultiply_count=0,
            params=pairs(
                "original_image_width=8 original_image_height=8 target_image_width=4 target_image_height=4 "
                "original_image_layout=NCHW target_image_layout=NCHW confidence_threshold=0.5"
            ),
        ),
        model_node("recognize", "mean", "image=extract.images", "mean=mean"),
    ],
    "means=recognize.mean images=extract.images confidence_levels=extract.confidences",
)
ANY_BATCH = pipeline("any_batch", "in", [DUMMY], "out=n1.x", demultiply_count=-1)
TRANSFORMED = pipeline(
    "transformed",
    "0",
    [
        custom_node(
            "transform",
            "image_transformation",
            "image=request.0",
            "image=image",
            params=pairs(
                "original_image_layout=NHWC target_image_layout=NHWC target_image_width=2 target_image_height=2 "
                "mean_values=[1,2,3] scale_values=[2,2,2]"
            ),
        ),
        model_node("n", "picture", "x=transform.image", "y=y"),
    ],
    "1463=n.y",
)
PICTURES = pipeline(
    "pictures", "image", [model_node("n", "picture", "x=request.image", "y=y")], "y=n.y", demultiply_count=-1
)
WORDS = pipeline("words", "text", [model_node("n", "strings", "text=request.text", "echo=text")], "echo=n.echo")
FAILS = pipeline("fails", "x", [custom_node("n", "failing", "x=request.x", "y=y")], "y=n.y")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with all models and libraries."""
    path = tmp_path_factory.mktemp("pipelines")
    for name, model in MODELS.items():
        model_zoo.save(model(), path / name)
    (path / "operations.py").write_text(OPERATIONS)
    (path / "maximum.py").write_text(MAXIMUM)
    (path / "failing.py").write_text(FAILING)
    return path


MODELS = {
    "dummy": plus_one,
    "relu": model_zoo.relu,
    "add": lambda: model_zoo.add((1, 4)),
    "detector": detector,
    "mean": mean_of_picture,
    "strings": model_zoo.strings,
    "picture": lambda: model_zoo.relu((1, 2, 2, 3)),
}
LAYOUTS = {"picture": {"layout": "NHWC"}}
LIBRARIES = {
    "operations": "operations.py",
    "maximum": "maximum.py",
    "failing": "failing.py",
    "object_detection": "/ovms/lib/libcustom_node_model_zoo_intel_object_detection.so",
    "image_transformation": "/ovms/lib/libcustom_node_image_transformation.so",
}
MAXIMA = [choose(kind) for kind in ("minimum", "average", "maximum")]
PIPELINES = [CHAIN, ENSEMBLE, *MAXIMA, ALL_RESULTS, VEHICLES, ANY_BATCH, TRANSFORMED, PICTURES, WORDS, FAILS]


def write(directory, *pipelines, models=("dummy",), libraries=None, **sections):
    """Write a config with models and libraries {name: base_path}."""
    entries = [{"name": name, "base_path": name, "plugin_config": EXACT, **LAYOUTS.get(name, {})} for name in models]
    codes = [{"name": name, "base_path": path} for name, path in (libraries or {}).items()]
    return write_config(
        directory, *entries, pipeline_config_list=pipelines, custom_node_library_config_list=codes, **sections
    )


@pytest.fixture(scope="module")
def served(directory):
    config = write(directory, *PIPELINES, models=MODELS, libraries=LIBRARIES, monitoring={"metrics": {"enable": True}})
    with serve(directory, "-w", "2", config=config) as running:
        yield running


def send(service, name, **arrays):
    """Send an inference with FP32 arrays; return the response."""
    tensors = [
        {"name": tensor, "datatype": "FP32", "shape": array.shape, "data": array.ravel().tolist()}
        for tensor, array in arrays.items()
    ]
    return service.infer(name, {"inputs": tensors})


def infer(service, name, **arrays):
    """Infer with FP32 arrays; return the outputs as arrays by name."""
    response = send(service, name, **arrays)
    assert response.status == 200, response.body
    found = response.json()
    assert (found["model_name"], found["model_version"]) == (name, "1")
    return {item["name"]: np.array(item["data"]).reshape(item["shape"]) for item in found["outputs"]}


TEN = np.arange(10, dtype=np.float32).reshape(1, 10)
FACTORS = np.array([[100, 5, 3, 2]], np.float32)


# --- The examples of OVMS


def test_a_chain_is_served(served):
    assert infer(served, "chain", **{"in": TEN})["out"].tolist() == (TEN + 2).tolist()


def test_fan_out_and_fan_in_with_outputs_in_alphabetical_order(served):
    x = np.array([[-1, 2, 3, 4]], np.float32)
    found = infer(served, "ensemble", image=x)
    assert list(found) == ["first", "label"]
    assert found["label"].tolist() == [[0, 4, 6, 8]]


@pytest.mark.parametrize("kind", ["minimum", "average", "maximum"])
def test_a_static_demultiplexer_is_gathered_by_a_node(served, kind):
    choose = {"minimum": np.min, "average": np.mean, "maximum": np.max}[kind]
    candidates = [TEN + 100 + 1, TEN - 5 + 1, TEN * 3 + 1, TEN / 2 + 1]
    found = infer(served, f"maximum_{kind}", numbers=TEN, factors=FACTORS)["best"]
    assert found.tolist() == max(candidates, key=choose).tolist()


def test_the_response_gathers_open_demultiplexers(served):
    found = infer(served, "all_results", numbers=TEN, factors=FACTORS)
    assert found["before"].shape == found["all"].shape == (4, 1, 10)
    assert found["all"].tolist() == (found["before"] + 1).tolist()


@pytest.mark.parametrize("count", [1, 3])
def test_a_dynamic_demultiplexer_returns_a_result_per_shard(served, count):
    image = np.zeros((1, 3, 8, 8), np.float32)
    image[:, :, 2:6] = np.repeat(np.arange(1, 5), 2)
    image[0, 0, 0, 0] = count
    found = infer(served, "vehicles", image=image)
    assert found["images"].shape == (count, 1, 3, 4, 4)
    assert found["means"].ravel().tolist() == [1, 2, 3][:count]
    assert found["means"].shape == (count, 1, 1)
    assert found["confidence_levels"].shape == (count, 1, 1)


def test_no_shards_are_a_204_without_a_body(served):
    response = send(served, "vehicles", image=np.zeros((1, 3, 8, 8)))
    assert (response.status, response.body) == (204, b"")
    assert {"content-type", "content-length"}.isdisjoint(response.headers)
    assert served.get("/v2/health/live").status == 200


@pytest.mark.parametrize("count", [1, 5])
def test_a_pipeline_with_a_count_splits_its_requests(served, count):
    x = np.arange(count * 10, dtype=np.float32).reshape(count, 1, 10)
    assert infer(served, "any_batch", **{"in": x})["out"].tolist() == (x + 1).tolist()


def test_a_custom_node_feeds_a_model(served):
    picture = np.full((1, 4, 6, 3), 9, np.float32)
    assert infer(served, "transformed", **{"0": picture})["1463"].tolist() == [[[[4, 3.5, 3]] * 2] * 2]


# --- The same routes as a model


def test_metadata_describes_the_pipelines_tensors(served):
    def tensor(name, shape):
        return {"name": name, "datatype": "FP32", "shape": shape}

    head = {"versions": ["1"], "platform": "OpenVINO"}
    assert served.get("/v2/models/any_batch").json() == {
        "name": "any_batch",
        **head,
        "inputs": [tensor("in", [-1, 1, 10])],
        "outputs": [tensor("out", [-1, 1, 10])],
    }
    assert served.get("/v2/models/all_results/versions/1").json() == {
        "name": "all_results",
        **head,
        "inputs": [tensor("factors", [1, 4]), tensor("numbers", [1, 10])],
        "outputs": [tensor("all", [4, 1, 10]), tensor("before", [4, 1, 10])],
    }


def test_a_pipeline_is_ready_and_has_version_1(served):
    for path in ("/v2/health/ready", "/v2/models/chain/ready", "/v2/models/chain/versions/1/ready"):
        assert served.get(path).status == 200
    response = served.get("/v2/models/chain/versions/2/ready")
    assert (response.status, response.json()) == (
        404,
        {"error": "version '2' of pipeline 'chain' is not served; served: 1"},
    )


def test_tritonclient_uses_a_pipeline_like_a_model(served):
    with InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        tensor = InferInput("in", [1, 10], "FP32")
        tensor.set_data_from_numpy(TEN)
        assert client.infer("chain", [tensor], request_id="7").as_numpy("out").tolist() == (TEN + 2).tolist()
        config = client.get_model_config("chain")
        assert [item["name"] for item in config["input"]] == ["in"]
        assert client.is_model_ready("chain")
        (stats,) = client.get_inference_statistics("chain")["model_stats"]
        assert stats["inference_stats"]["success"]["count"] >= 1


def test_a_mistake_in_the_request_is_a_400(served):
    response = send(served, "chain", **{"in": np.zeros((1, 9))})
    assert (response.status, response.json()) == (400, {"error": "input 'in': shape is [1,9], the model takes [1,10]"})


def test_strings_pass_through_a_pipeline(served):
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "ü"]}]}
    (output,) = served.infer("words", body).json()["outputs"]
    assert output["data"] == ["a", "ü"]


def encoded(*pictures):
    files = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def infer_images(service, name, tensor, *pictures):
    head = json.dumps({"inputs": [{"name": tensor, "datatype": "BYTES", "shape": [len(pictures)]}]}).encode()
    body = head + encoded(*pictures)
    response = service.infer(name, body, Inference_Header_Content_Length=str(len(head)))
    (output,) = response.json().get("outputs", [None])
    return response if output is None else np.array(output["data"]).reshape(output["shape"])


def test_each_image_of_a_split_request_is_a_shard(served):
    """Each is resized for the model, whose layout is NHWC."""
    pictures = [np.full((size, size, 3), size, np.uint8) for size in (2, 5, 7)]
    found = infer_images(served, "pictures", "image", *pictures)
    assert found.shape == (3, 1, 2, 2, 3)
    assert found[:, 0, 0, 0, 0].tolist() == [2, 5, 7]


def test_images_go_to_custom_nodes_without_resizing(served):
    picture = np.full((3, 5, 3), 9, np.uint8)
    assert infer_images(served, "transformed", "0", picture).tolist() == [[[[4, 3.5, 3]] * 2] * 2]


def test_metrics_count_pipelines_and_their_models(served):
    def count(family, name):
        line = next(line for line in served.get("/metrics").body.decode().splitlines() if line.startswith(family)
                    and f'name="{name}"' in line and 'method="ModelMetadata"' not in line)  # fmt: skip
        return float(line.rpartition(" ")[2])

    before = count("ovms_inference_time_us_count", "dummy"), count("ovms_requests_success{", "any_batch")
    infer(served, "any_batch", **{"in": np.zeros((3, 1, 10), np.float32)})
    assert count("ovms_inference_time_us_count", "dummy") == before[0] + 3
    assert count("ovms_requests_success{", "any_batch") == before[1] + 1
    text = served.get("/metrics").body.decode()
    assert 'ovms_request_time_us_count{interface="REST",name="any_batch",version="1"}' in text
    assert 'ovms_inference_time_us_count{name="any_batch"' not in text


# --- Errors and crashes


def test_an_exception_in_a_node_is_a_500_with_its_traceback_in_the_log(served):
    response = send(served, "fails", x=TEN)
    assert response.status == 500
    assert "a bug of the user's" not in response.json()["error"]
    assert "ZeroDivisionError: a bug of the user's" in served.log
    assert "failing.py" in served.log


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_crashing_library_ends_a_worker_but_not_the_service(tmp_path):
    build_c_node(tmp_path / "node.so", "-DWITH_DEINITIALIZE")
    crashing = custom_node("n", "own", "x=request.x", "y=y", params={"mode": "crash below 0", "add": "1"})
    config = write(tmp_path, pipeline("p", "x", [crashing], "y=n.y"), models=(), libraries={"own": "node.so"})
    x = np.float32([[1, 2]])
    with serve(tmp_path, "-w", "2", config=config) as service:
        assert infer(service, "p", x=x)["y"].tolist() == (x + 1).tolist()
        service.wait_for(lambda: len(service.workers()) == 2)
        before = service.workers()
        with pytest.raises((ConnectionError, OSError)):
            send(service, "p", x=-x)
        service.wait_for(lambda: len(service.workers()) == 2 and service.workers() != before)
        (dead,) = set(before) - set(service.workers())
        assert f"worker {dead} died of SIG" in service.log
        assert " during an inference with 'p/1' (name and version), request " in service.log
        assert infer(service, "p", x=x)["y"].tolist() == (x + 1).tolist()


# --- Reports of mistakes


@pytest.fixture
def own(directory, tmp_path):
    """A directory with only the model dummy."""
    shutil.copytree(directory / "dummy", tmp_path / "dummy")
    return tmp_path


@pytest.fixture(scope="module")
def reloading(directory, tmp_path_factory):
    """A service without models or pipelines that looks for changes only when asked; with its directory."""
    path = tmp_path_factory.mktemp("reloading")
    with serve(path, "-w", "1", config=write(path, models=()), OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS="0") as service:
        yield service, path


WRONG = pipeline(
    "wrong",
    "in",
    [
        model_node("n1", "dummy", "c=request.in", "x=a"),
        model_node("n2", "missing", "b=n1.x", "x=a"),
        custom_node("n3", "nowhere", "x=n2.x", "y=y"),
    ],
    "out=n9.y",
)


def test_all_mistakes_of_a_pipeline_are_reported_everywhere(own):
    config = write(own, CHAIN, WRONG)
    checked = subprocess.run(["ovms-rest", "check", str(config)], capture_output=True, text=True, check=False)
    lines = [line for line in checked.stdout.splitlines() if line.startswith("problem: pipeline 'wrong': ")]
    assert checked.returncode == 1
    assert "1 of 1 models and 1 of 2 pipelines serve" in checked.stdout
    for part in ("'n1'", "'c'", "model 'missing' is not configured", "library 'nowhere'", "'n9'"):
        assert any(part in line for line in lines), (part, lines)
    with serve(own, "-w", "1", config=config) as service:
        (item,) = service.get("/v1/config").json()["wrong"]["model_version_status"]
        assert (item["version"], item["state"]) == ("1", "LOADING")
        assert item["status"]["error_code"] == "FAILED_PRECONDITION"
        reasons = item["status"]["error_message"]
        for place in ("/v2/health/ready", "/v2/models/wrong/ready", "/v2/models/wrong"):
            response = service.get(place)
            assert response.status in (400, 404)
            assert reasons in response.json()["error"]
        reload = service.request("POST", "/v1/config/reload")
        assert reload.status == 412
        assert "pipeline 'wrong': " in reload.json()["error"]
        assert service.infer("wrong", b"{}").status == 404
        assert infer(service, "chain", **{"in": TEN})["out"].tolist() == (TEN + 2).tolist()


def test_a_pipeline_becomes_available_with_its_model(reloading, directory):
    service, path = reloading
    shutil.copytree(directory / "dummy", path / "dummy")
    write(path, CHAIN, models=())
    assert service.request("POST", "/v1/config/reload").status == 412
    response = service.get("/v2/models/chain/ready")
    assert response.status == 404
    assert "model 'dummy' is not configured" in response.json()["error"]
    write(path, CHAIN)
    assert service.request("POST", "/v1/config/reload").status == 201
    assert infer(service, "chain", **{"in": TEN})["out"].tolist() == (TEN + 2).tolist()


# --- Changes

MULTIPLYING = CUSTOM.replace("+ 1", "* NUMBER")


def test_pipelines_follow_changes_of_models_and_libraries(reloading, directory):
    service, path = reloading
    model, code = path / "changing", path / "times.py"

    def change(number):
        code.write_text(f"NUMBER = {number}\n{MULTIPLYING}")
        return service.request("POST", "/v1/config/reload")

    def compute():
        return infer(service, "p", **{"in": TEN})["out"].tolist()

    shutil.copytree(directory / "dummy", model)
    nodes = [custom_node("t", "times", "x=request.in", "y=y"), model_node("n", "changing", "b=t.y", "x=a")]
    write(path, pipeline("p", "in", nodes, "out=n.x"), models=["changing"], libraries={"times": "times.py"})
    assert change(2).status == 201
    assert compute() == (2 * TEN + 1).tolist()
    assert change(3).status == 201
    assert compute() == (3 * TEN + 1).tolist()
    b = model_zoo.parameter("b", (1, 10), Type.f32)
    model_zoo.save(model_zoo.model_of({"a": opset15.multiply(b, np.float32(10))}, [b]), model, 2)
    assert change(3).status == 201
    assert compute() == (30 * TEN).tolist()
    response = change("")
    assert response.status == 412
    assert "times.py" in response.json()["error"]
    assert compute() == (30 * TEN).tolist()


def test_a_changed_file_of_a_node_is_loaded_without_a_reload_call(tmp_path):
    (tmp_path / "node.py").write_text("NUMBER = 2\n" + MULTIPLYING)
    definition = pipeline("p", "x", [custom_node("n", "own", "x=request.x", "y=y")], "y=n.y")
    config = write(tmp_path, definition, models=(), libraries={"own": "node.py"})
    with serve(tmp_path, "-w", "1", config=config) as service:
        assert infer(service, "p", x=TEN)["y"].tolist() == (2 * TEN).tolist()
        (tmp_path / "node.py").write_text("NUMBER = 3\n" + MULTIPLYING)
        service.wait_for(lambda: infer(service, "p", x=TEN)["y"].tolist() == (3 * TEN).tolist())


def test_unloading_a_model_with_dependents_unloads_its_pipelines(own):
    with serve(own, "-w", "1", config=write(own, CHAIN), OVMS_REST_MODEL_CONTROL="local") as service:

        def control(action, name, **parameters):
            path = f"/v2/repository/models/{name}/{action}"
            return service.request("POST", path, {"parameters": parameters}).status

        assert control("unload", "dummy") == 200
        assert service.get("/v2/health/ready").status == 200  # the pipeline lacks nothing but the unloaded model
        response = service.get("/v2/models/chain/ready")
        assert (response.status, response.json()) == (
            404,
            {
                "error": "pipeline 'chain' does not serve: node 'n1': model 'dummy' was unloaded; "
                "node 'n2': model 'dummy' was unloaded"
            },
        )
        assert control("load", "dummy") == 200
        assert infer(service, "chain", **{"in": TEN})["out"].tolist() == (TEN + 2).tolist()
        assert control("unload", "dummy", unload_dependents=True) == 200
        assert service.get("/v2/health/ready").status == 200
        assert control("load", "chain") == 412
        assert control("load", "dummy") == 200
        assert service.get("/v2/models/chain/ready").status == 404
        assert control("load", "chain") == 200
        assert infer(service, "chain", **{"in": TEN})["out"].tolist() == (TEN + 2).tolist()
        assert control("load", "chain", config="{}") == 400
