"""A service that root starts for another user, with gunicorn's --user and --group: its workers have fewer rights."""

import contextlib
import os
import pwd
import signal
import tempfile
from pathlib import Path

import model_zoo
import pytest
from generations import works
from service import serve, write_config

NOBODY = pwd.getpwnam("nobody")
OPTIONS = ("-w", "2", "--user", "nobody", "--group", str(NOBODY.pw_gid))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes of another user")


@pytest.fixture
def directory():
    """A directory that every user may read; pytest's own belong to root."""
    with tempfile.TemporaryDirectory(prefix="ovms_rest-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def relu(directory):
    return prepare(directory)


def prepare(directory):
    model_zoo.save(model_zoo.relu(), directory / "relu")
    return write_config(directory, {"name": "relu", "base_path": "relu"})


def owner(pid):
    return os.stat(f"/proc/{pid}").st_uid


def test_models_are_reloaded_loaded_and_unloaded_by_call(directory, relu):
    variables = {"OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0", "OVMS_REST_MODEL_CONTROL": "local"}
    with serve(directory, *OPTIONS, config=relu, **variables) as service:
        assert works(service)
        service.wait_for(lambda: {owner(pid) for pid in service.workers()} == {NOBODY.pw_uid})
        assert service.request("POST", "/v1/config/reload").status == 200
        model_zoo.save(model_zoo.relu(), directory / "relu", 2)
        assert service.request("POST", "/v1/config/reload").status == 201
        assert service.get("/v2/models/relu").json()["versions"] == ["2"]
        assert service.request("POST", "/v2/repository/models/relu/unload").status == 200
        assert service.get("/v2/models/relu/ready").status == 404
        assert service.request("POST", "/v2/repository/models/relu/load").status == 200
        assert works(service)
        assert {owner(pid) for pid in service.workers()} == {NOBODY.pw_uid}


@pytest.mark.parametrize("control", [False, True], ids=["no control address", "a control address"])
def test_new_version_is_noticed(directory, relu, control):
    path = directory / "control"
    with serve(directory, *OPTIONS, config=relu, OVMS_REST_CONTROL_BIND=f"unix:{path}" if control else "") as service:
        assert works(service)
        if control:
            assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
        model_zoo.save(model_zoo.relu(), directory / "relu", 2)
        service.wait_for(lambda: service.get("/v2/models/relu").json()["versions"] == ["2"])
        assert "only noticed by a reload" not in service.log


def test_models_readable_by_root_only_serve_and_are_reloaded_by_call(tmp_path):
    """The log says that their changes are not noticed."""
    tmp_path.chmod(0o700)
    with serve(tmp_path, *OPTIONS, config=prepare(tmp_path)) as service:
        assert works(service)
        line = f"changes of {tmp_path}/relu are only noticed by a reload: user {NOBODY.pw_uid} may not read it"
        service.wait_for(lambda: line in service.log)
        before = service.log.count("Handling signal: control")
        model_zoo.save(model_zoo.relu(), tmp_path / "relu", 2)
        assert service.request("POST", "/v1/config/reload").status == 201
        assert service.get("/v2/models/relu").json()["versions"] == ["2"]
        assert service.log.count("Handling signal: control") == before + 1


@pytest.mark.parametrize("options", [(), ("--capture-output",)], ids=["", "--capture-output"])
def test_logs_in_a_directory_of_root_are_reopened_after_a_move(directory, relu, options):
    names = ("service.log", "access", "requests")
    error, access, requests = (directory / name for name in names)
    files = ("--error-logfile", str(error), "--access-logfile", str(access))
    variables = {"OVMS_REST_ACCESS_LOG": "json", "OVMS_REST_ACCESS_LOG_FILE": str(requests)}
    with serve(directory, *OPTIONS, *files, *options, config=relu, **variables) as service:
        service.wait_for_workers(2)
        workers = service.workers()
        assert works(service)
        for name in names:
            (directory / name).rename(directory / f"{name}.old")
        service.signal(signal.SIGUSR1)

        def is_written():
            assert works(service)
            return all((directory / name).exists() and (directory / name).read_text() for name in names[1:])

        service.wait_for(is_written)
        service.signal(signal.SIGTTIN)
        service.wait_for(lambda: "Handling signal: ttin" in service.log)
        assert {path.stat().st_uid for path in (error, access, requests)} == {NOBODY.pw_uid}
        assert set(workers) < set(service.wait_for(lambda: len(found := service.workers()) == 3 and found))
        assert "cannot" not in service.log + (directory / "service.log.old").read_text()


@contextlib.contextmanager
def logging_to(directory, config, logs):
    """Serve with gunicorn's access log and ours in a directory; yield the service and the paths of the logs."""
    access, requests = logs / "access", logs / "requests"
    variables = {"OVMS_REST_ACCESS_LOG": "json", "OVMS_REST_ACCESS_LOG_FILE": str(requests)}
    with serve(directory, *OPTIONS, "--access-logfile", str(access), config=config, **variables) as service:
        service.wait_for_workers(2)
        yield service, (access, requests)


def reopen(service):
    """Have the logs reopened, and wait until the arbiter has handled another signal after that."""
    service.signal(signal.SIGUSR1)
    service.signal(signal.SIGTTIN)
    service.wait_for_workers(3)


@pytest.mark.parametrize("replace", [Path.symlink_to, Path.hardlink_to])
def test_link_to_a_file_of_root_in_place_of_a_log_does_not_give_the_file_to_the_workers(directory, relu, replace):
    """The workers may write to the directory of the logs."""
    logs = directory / "logs"
    logs.mkdir()
    os.chown(logs, NOBODY.pw_uid, NOBODY.pw_gid)
    secrets = [directory / name for name in ("one", "other")]
    with logging_to(directory, relu, logs) as (service, paths):
        assert {path.stat().st_uid for path in paths} == {NOBODY.pw_uid}
        for path, secret in zip(paths, secrets, strict=True):
            secret.touch(mode=0o600)
            path.unlink()
            replace(path, secret)
        reopen(service)
        assert [secret.stat().st_uid for secret in secrets] == [0, 0]


def test_logs_that_are_links_are_written_and_reopened(directory, relu):
    logs, disk = directory / "logs", directory / "disk"
    for made in (logs, disk):
        made.mkdir()
    for name in ("access", "requests"):
        (disk / name).touch()
        os.chown(disk / name, NOBODY.pw_uid, NOBODY.pw_gid)
        (logs / name).symlink_to(disk / name)
    with logging_to(directory, relu, logs) as (service, paths):
        for _ in range(2):
            assert works(service)
            service.wait_for(lambda: all(path.read_text() for path in paths))
            for path in paths:
                path.write_text("")
            reopen(service)
            service.signal(signal.SIGTTOU)
            service.wait_for_workers(2)
        assert "cannot" not in service.log
