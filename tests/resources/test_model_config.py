"""Triton's model configuration extension: the description of a model, and its agreement with the metadata."""

import model_zoo
import pytest
from openvino import Type
from service import serve, write_config

from ovms_rest.models.compilation import Compilation
from ovms_rest.models.options import ModelOptions, parse_options
from ovms_rest.models.runtime import Model
from ovms_rest.resources.model_config import describe_config

LATEST = {"latest": {"num_versions": 1}}


def describe(directory, model, compilation=None, workers=0, **options):
    """Save a model and describe how it is served."""
    model_zoo.save(model, directory)
    compilation = compilation or Compilation("CPU", {}, shared=True, reason="")
    loaded = Model("m", 1, directory / "1", compilation, parse_options(ModelOptions(**options)))
    return describe_config(loaded, LATEST, workers)


# --- The description


def test_model_is_described_completely(tmp_path):
    properties = {"NUM_STREAMS": 0, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}
    compilation = Compilation("CPU", properties, shared=True, reason="")
    assert describe(tmp_path, model_zoo.relu(), compilation=compilation, workers=2) == {
        "name": "m",
        "platform": "OpenVINO",
        "backend": "openvino",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            {
                "name": "x",
                "data_type": "TYPE_FP32",
                "dims": [-1, 4],
                "format": "FORMAT_NONE",
                **dict.fromkeys(("is_shape_tensor", "allow_ragged_batch", "optional"), False),
            }
        ],
        "output": [
            {"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 4], "label_filename": "", "is_shape_tensor": False}
        ],
        "instance_group": [{"name": "m", "kind": "KIND_CPU", "count": 2}],
        "default_model_filename": "model.xml",
        "parameters": {
            "target_device": {"string_value": "CPU"},
            "NUM_STREAMS": {"string_value": "0"},
            "ENABLE_CPU_PINNING": {"string_value": "false"},
            "INFERENCE_PRECISION_HINT": {"string_value": "f32"},
        },
        "model_transaction_policy": {"decoupled": False},
    }


def test_unknown_number_of_workers_is_left_out(tmp_path):
    assert describe(tmp_path, model_zoo.relu())["instance_group"] == [{"name": "m", "kind": "KIND_CPU"}]


def test_device_other_than_cpu_has_kind_auto(tmp_path):
    compilation = Compilation("AUTO:GPU,CPU", {}, shared=False, reason="")
    described = describe(tmp_path, model_zoo.relu(), compilation=compilation)
    assert described["instance_group"] == [{"name": "m", "kind": "KIND_AUTO"}]
    assert described["parameters"] == {"target_device": {"string_value": "AUTO:GPU,CPU"}}


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((), []), ((2, 0), [2, 0]), ((-1, "1..8"), [-1, -1]), ("...", [-1])],
    ids=["scalar", "no elements", "dynamic and ranged", "any rank"],
)
def test_dims_are_the_whole_shape(tmp_path, shape, dims):
    model = model_zoo.relu(shape)
    described = describe(tmp_path, model)
    assert [tensor["dims"] for tensor in described["input"] + described["output"]] == [dims, dims]


@pytest.mark.parametrize(
    ("layout", "format_"), [("NHWC", "NHWC"), ("NCHW", "NCHW"), ("NHWC:NCHW", "NHWC"), ("NDHW", "NONE")]
)
def test_format_is_the_layout_of_clients(tmp_path, layout, format_):
    described = describe(tmp_path, model_zoo.relu((1, 3, 3, 3)), layout=layout)
    assert described["input"][0]["format"] == f"FORMAT_{format_}"


# --- By HTTP


@pytest.mark.parametrize("model", ["relu", "add", "types", "scalar", "strings", "text2d", "matrix", "onnx"])
def test_names_datatypes_shapes_and_order_match_the_metadata(service, model):
    config, metadata = service.get(f"/v2/models/{model}/config").json(), service.get(f"/v2/models/{model}").json()
    for described, known in ((config["input"], metadata["inputs"]), (config["output"], metadata["outputs"])):
        assert [(tensor["name"], tensor["dims"]) for tensor in described] == [
            (tensor["name"], tensor["shape"]) for tensor in known
        ]
        assert [tensor["data_type"].replace("STRING", "BYTES") for tensor in described] == [
            f"TYPE_{tensor['datatype']}" for tensor in known
        ]


def test_parameters_show_how_a_model_was_compiled(service):
    answer = service.get("/v2/models/relu/versions/1/config")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    config = answer.json()
    assert config["parameters"]["INFERENCE_PRECISION_HINT"] == {"string_value": "f32"}


def test_workers_are_counted(service):
    def instances():
        return service.get("/v2/models/relu/config").json()["instance_group"]

    service.wait_for(lambda: instances() == [{"name": "relu", "kind": "KIND_CPU", "count": 2}])


def test_head_works_where_get_does(service):
    answer = service.request("HEAD", "/v2/models/relu/config")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    ("path", "beginning"),
    [
        ("/v2/models/none/config", "unknown model 'none'; configured: "),
        ("/v2/models/relu/versions/2/config", "version '2' of model 'relu' is not served; served: 1"),
        ("/v2/models/relu/versions/01/config", "version '01' of model 'relu' is not served; served: 1"),
    ],
)
def test_unserved_model_is_not_found(service, path, beginning):
    answer = service.get(path)
    assert answer.status == 404
    assert answer.json()["error"].startswith(beginning)


def test_post_is_not_allowed(service):
    answer = service.request("POST", "/v2/models/relu/config", {})
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_version_policy_and_reason_of_a_failure_are_returned(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "m", 1)
    model_zoo.save(model_zoo.relu((1, 4), Type.i32), tmp_path / "m", 3)
    model_zoo.save(model_zoo.relu(), tmp_path / "broken")
    (tmp_path / "broken/1/model.xml").write_text("no model")
    policies = {
        "by default": (None, {"latest": {"num_versions": 1}}),
        "latest": ({"latest": {"num_versions": 2}}, {"latest": {"num_versions": 2}}),
        "all": ({"all": {}}, {"all": {}}),
        "specific": ({"specific": {"versions": [3, 1]}}, {"specific": {"versions": [1, 3]}}),
    }
    models = [
        {"name": name, "base_path": "m", **({} if policy is None else {"model_version_policy": policy})}
        for name, (policy, _) in policies.items()
    ]
    config = write_config(tmp_path, *models, {"name": "broken", "base_path": "broken"})
    with serve(tmp_path, "-w", "1", config=config) as service:
        for name, (_, expected) in policies.items():
            assert service.get(f"/v2/models/{name.replace(' ', '%20')}/config").json()["version_policy"] == expected
        assert service.get("/v2/models/all/config").json()["input"][0]["data_type"] == "TYPE_INT32"
        assert service.get("/v2/models/all/versions/1/config").json()["input"][0]["data_type"] == "TYPE_FP32"
        answer = service.get("/v2/models/broken/config")
        assert answer.status == 404
        assert answer.json()["error"].startswith("model 'broken' does not serve: version 1 cannot read ")
