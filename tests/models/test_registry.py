"""The registry of served models, with models that compute nothing."""

import pytest

from ovms_rest.errors import LoadError, NotFoundError, NotReadyError
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.protocol.tensors import ModelMetadata


class FakeModel:
    """A version that opens, or fails to for a reason; a pipeline if it has `dependencies`."""

    def __init__(self, name="m", version=1, failure="", dependencies=()):
        self.metadata = ModelMetadata(name, str(version), {}, {})
        self.failure, self.dependencies = failure, dependencies
        self.is_open = False

    def open(self, retire):
        if self.failure:
            raise LoadError(self.failure)
        self.is_open = True


def serve(*versions):
    return ModelRegistry({"m": Entry({version: FakeModel(version=version) for version in versions})})


def open_all(models):
    """Return the labels of the versions in the order in which they are opened."""
    opened = []
    models.open(opened.append, retire=lambda: None)
    return opened


# --- Finding a version


def test_highest_version_is_the_default():
    models = serve(2, 10, 9)
    assert models.versions("m") == ["2", "9", "10"]
    assert models.find("m") is models.find("m", "10")
    assert models.find("m").metadata.version == "10"


def test_unknown_name_is_reported_with_the_known_ones():
    models = ModelRegistry({f"m{index}": Entry(reason="why") for index in range(12)})
    with pytest.raises(NotFoundError) as error:
        models.find("x")
    assert str(error.value) == (
        "unknown model 'x'; configured: 'm0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'm9', ..."
    )


@pytest.mark.parametrize("version", ["0", "01", "2", "x", "-1", "1.0", "", "9223372036854775808"])
def test_unknown_version_is_reported_with_the_served_ones(version):
    with pytest.raises(NotFoundError) as error:
        serve(1).find("m", version)
    assert str(error.value) == f"version {version!r} of model 'm' is not served; served: 1"


def test_inference_is_refused_with_the_route_that_reports_the_reason():
    """The reason may be OpenVINO's own text, which inference clients must not see (protocol/README.md section 1)."""
    models = ModelRegistry({"m": Entry({1: FakeModel()}, {2: "is broken"}), "no such": Entry(reason="missing")})
    with pytest.raises(NotFoundError) as error:
        models.find("no such")
    assert str(error.value) == "model 'no such' does not serve; GET /v2/models/no%20such/ready says why"
    with pytest.raises(NotFoundError) as error:
        models.find("m", "2")
    assert str(error.value) == "version '2' of model 'm' does not serve; GET /v2/models/m/versions/2/ready says why"


# --- Opening and readiness


def test_registry_is_ready_when_a_version_of_every_model_serves():
    models = serve(1, 2)
    models.check_ready()
    models.give_up("m/2", "broke")
    models.check_ready()
    models.give_up("m/1", "broke")
    with pytest.raises(NotReadyError, match=r"^model 'm' does not serve: version 1 broke; version 2 broke$"):
        models.check_ready()


def test_opening_reports_each_version_before_it_is_opened():
    models = ModelRegistry(
        {
            "a": Entry({1: FakeModel("a")}),
            "b": Entry({2: FakeModel("b", 2), 1: FakeModel("b")}),
        }
    )
    assert open_all(models) == ["a/1", "b/2", "b/1", ""]
    assert all(model.is_open for entry in models.entries.values() for model in entry.versions.values())


def test_model_that_fails_to_open_is_given_up_with_the_pipelines_that_need_it():
    a, b = FakeModel("a", failure="lacks a device"), FakeModel("b")
    pipelines = {"p": FakeModel("p", dependencies=(b, a)), "q": FakeModel("q", dependencies=(b,))}
    models = ModelRegistry(
        {"a": Entry({1: a}), "b": Entry({1: b})}
        | {name: Entry({1: pipeline}, kind="pipeline") for name, pipeline in pipelines.items()}
    )
    open_all(models)
    assert models.problems() == [
        "model 'a' version 1 lacks a device",
        "pipeline 'p' version 1 needs model 'a', which does not serve",
    ]
    assert (b.is_open, pipelines["q"].is_open) == (True, True)


def test_given_up_version_is_no_longer_served(caplog):
    models = serve(1, 2)
    models.give_up("m/2", "broke down")
    assert models.find("m").metadata.version == "1"
    with pytest.raises(NotFoundError, match=r"^version '2' of model 'm' does not serve: broke down$"):
        models.find("m", "2", explain=True)
    models.give_up("m/1", "did too")
    with pytest.raises(NotFoundError, match=r"^model 'm' does not serve: version 1 did too; version 2 broke down$"):
        models.find("m", explain=True)
    assert "version 2 of model 'm' is given up: broke down" in caplog.text


# --- Status


def test_status_names_the_state_of_each_version():
    entry = Entry({1: FakeModel()}, {3: "is broken"})
    assert [(each["version"], each["state"], each["status"]["error_message"]) for each in entry.status()] == [
        ("1", "AVAILABLE", "OK"),
        ("3", "LOADING", "is broken"),
    ]
    assert entry.readiness() == {"1": True, "3": False}
    assert entry.problems("m") == ["model 'm' version 3 is broken"]


def test_model_without_versions_has_the_reason_as_status_of_version_1():
    entry = Entry(reason="a; b", details=("a", "b"))
    assert [(each["version"], each["status"]["error_message"]) for each in entry.status()] == [("1", "a; b")]
    assert entry.readiness() == {"1": False}
    assert entry.problems("m") == ["model 'm': a", "model 'm': b"]


def test_unloaded_model_has_ended_and_is_not_expected_to_be_ready():
    entry = Entry({1: FakeModel(), 2: FakeModel(version=2)}).end()
    assert [(each["version"], each["state"]) for each in entry.status()] == [("1", "END"), ("2", "END")]
    assert (entry.readiness(), entry.problems("m")) == ({}, [])
    models = ModelRegistry({"m": entry})
    models.check_ready()
    with pytest.raises(NotFoundError, match=r"it was unloaded; POST /v2/repository/models/m/load serves it again$"):
        models.find("m")


@pytest.mark.parametrize(
    ("failed", "shown", "why"),
    [
        (
            Entry(reason="has no versions"),
            ["1 LOADING has no versions", "2 LOADING has no versions"],
            "has no versions",
        ),
        (Entry(failures={2: "is broken"}), ["1 END OK", "2 LOADING is broken"], "version 2 is broken"),
        (Entry(failures={3: "is broken"}), ["1 END OK", "2 END OK", "3 LOADING is broken"], "version 3 is broken"),
    ],
)
def test_unloaded_model_that_could_not_be_loaded_has_the_reasons_and_need_not_be_ready(failed, shown, why):
    entry = Entry({1: FakeModel(), 2: FakeModel(version=2)}).end()
    after = entry.fail(failed)
    found = [f"{each['version']} {each['state']} {each['status']['error_message']}" for each in after.status()]
    assert (found, after.readiness(), after.differs(entry)) == (shown, {}, True)
    models = ModelRegistry({"m": after})
    models.check_ready()
    assert models.problems() == []
    message = "model 'm' does not serve: it was unloaded, and could not be loaded again"
    again = "POST /v2/repository/models/m/load serves it again"
    for explain, reason in ((True, f": {why}"), (False, " (GET /v2/models/m/ready says why)")):
        with pytest.raises(NotFoundError) as caught:
            models.find("m", explain=explain)
        assert str(caught.value) == f"{message}{reason}; {again}"
    assert not after.end().differs(entry)


@pytest.mark.parametrize(
    "change", [{"failures": {2: "is broken"}}, {"reason": "why"}, {"versions": {}}, {"ended": (1,)}, {"example": {}}]
)
def test_entry_differs_when_its_versions_or_reasons_do(change):
    versions = {1: FakeModel()}
    entry = Entry(versions)
    assert not entry.differs(Entry(dict(versions), notes=("another note",)))
    assert entry.differs(Entry(**{"versions": dict(versions)} | change))
