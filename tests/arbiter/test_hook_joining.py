"""gunicorn's server hooks in a user's settings file, besides those of the service."""

import os
import signal

import pytest
from generations import settings_with
from gunicorn.config import Config
from processes import upgraded
from service import run_to_end, serve

from ovms_rest.arbiter import gunicorn_settings, hook_joining
from ovms_rest.arbiter.hook_joining import join_hooks, joined

OF_TWO = ("child_exit", "post_fork", "pre_fork", "worker_exit")  # the arbiter and a worker
OF_ONE = ("on_reload", "on_starting", "post_worker_init", "pre_exec", "when_ready", "worker_abort")
HOOKS = "from ovms_rest.arbiter.gunicorn_settings import *\n" + "".join(
    f"def {name}({arguments}): arbiter.log.info('my {name}')\n"
    for names, arguments in ((OF_TWO, "arbiter, worker"), (OF_ONE, "arbiter"))
    for name in names
)


def test_all_hooks_but_the_first_are_joined():
    hooks = {name for name in gunicorn_settings.__all__ if callable(getattr(gunicorn_settings, name))}
    assert hooks == {*OF_TWO, *OF_ONE, "nworkers_changed"}
    assert set(hook_joining._hooks) == {*OF_TWO, *OF_ONE}


@pytest.mark.parametrize(
    ("name", "actions", "called"),
    [
        ("pre_fork", ["user"], ["user", "service"]),
        ("pre_fork", ["service", "user"], ["service", "user"]),
        ("pre_fork", ["user", "fail"], ["user"]),
        ("child_exit", ["user", "fail"], ["user", "service"]),
        ("child_exit", ["service", "fail"], ["service"]),
    ],
)
def test_hook_of_the_service_is_called_once(monkeypatch, name, actions, called):
    monkeypatch.setattr(hook_joining, "_hooks", {})
    calls = []

    def of_service(arbiter, worker):
        calls.append("service")

    def of_user(arbiter, worker):
        for action in actions:
            if action == "service":
                hook(arbiter, worker)
            elif action == "user":
                calls.append("user")
            else:
                raise ValueError("mine")

    of_service.__name__ = name
    hook, cfg = joined(of_service), Config()
    cfg.set(name, of_user)
    for _ in range(2):  # as gunicorn does when the number of workers changes
        join_hooks(cfg)
    if "fail" in actions:
        with pytest.raises(ValueError, match="mine"):
            getattr(cfg, name)(None, None)
    else:
        getattr(cfg, name)(None, None)
    assert calls == called


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "settings.py"
    path.write_text(HOOKS)
    return str(path)


def test_hooks_are_called_besides_those_of_the_service(tmp_path, settings):
    path = tmp_path / "service.sock"
    with serve(tmp_path, "-w", "1", "-c", settings, "-b", f"unix:{path}") as service:
        wait_for_calls(service, on_starting=1, pre_fork=1, post_fork=1, post_worker_init=1, when_ready=1)
        service.wait_for_workers(1)
        os.kill(service.workers()[0], signal.SIGABRT)
        wait_for_calls(service, worker_abort=1, child_exit=1, pre_fork=2, post_worker_init=2)
        service.wait_for_workers(1)
        service.signal(signal.SIGHUP)
        wait_for_calls(service, on_reload=1, worker_exit=1, child_exit=2, pre_fork=3, post_worker_init=3)
        # Hooks that are read again are joined again; a changed number of workers does not call any of them twice.
        service.signal(signal.SIGTTIN)
        wait_for_calls(service, pre_fork=4, post_worker_init=4)
        service.wait_for_workers(2)
        assert service.get("/v2/models/digits/ready").status == 200
    assert not path.exists(), "the hook when_ready of the service notes the paths that it may remove"


def test_upgrade_calls_both_hooks(tmp_path, settings):
    with serve(tmp_path, "-w", "1", "-c", settings) as service, upgraded(service, processes=1):
        wait_for_calls(service, pre_exec=1, on_starting=2, when_ready=2)


def test_hook_that_cannot_be_joined_has_to_call_that_of_the_service(tmp_path):
    line = "the hook nworkers_changed of the settings file has to call ovms_rest.arbiter.hooks.nworkers_changed"
    hook = "def nworkers_changed(arbiter, count, previous): pass"
    ended = run_to_end(tmp_path, "-w", "1", "-c", settings_with(tmp_path, hook))
    assert (ended.returncode, line in ended.stderr, "Traceback" in ended.stderr) == (1, True, False)
    hook = "ours = nworkers_changed\ndef nworkers_changed(arbiter, count, previous): ours(arbiter, count, previous)"
    with serve(tmp_path, "-w", "1", "-c", settings_with(tmp_path, hook)) as service:
        assert service.get("/v2/models/digits/ready").status == 200


def wait_for_calls(service, **counts):
    """Wait until the user's hooks have been called as often as this."""
    service.wait_for(lambda: {name: service.log.count(f"my {name}\n") for name in counts} == counts)
