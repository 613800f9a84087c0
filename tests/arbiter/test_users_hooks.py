"""gunicorn's server hooks in a user's settings file, besides those of the service."""

import os
import signal

import pytest
from processes import upgraded
from service import serve

from ovms_rest.arbiter import hooks

OF_TWO = ("child_exit", "post_fork", "pre_fork", "worker_exit")  # the arbiter and a worker
OF_ONE = ("on_reload", "on_starting", "post_worker_init", "pre_exec", "when_ready", "worker_abort")
HOOKS = "from ovms_rest.arbiter.gunicorn_settings import *\n" + "".join(
    f"def {name}({arguments}): arbiter.log.info('my {name}')\n"
    for names, arguments in ((OF_TWO, "arbiter, worker"), (OF_ONE, "arbiter"))
    for name in names
)


def test_all_hooks_of_the_service_are_known():
    assert {hook.__name__ for hook in hooks._HOOKS} == {*OF_TWO, *OF_ONE}


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


def wait_for_calls(service, **counts):
    """Wait until the user's hooks have been called as often as this."""
    service.wait_for(lambda: {name: service.log.count(f"my {name}\n") for name in counts} == counts)
