"""gunicorn's settings for the service, imported by gunicorn.conf.py; gunicorn's own flags take precedence."""

import os
import sys

from ovms_rest.arbiter.hooks import (
    child_exit,
    nworkers_changed,
    on_reload,
    on_starting,
    post_fork,
    post_worker_init,
    pre_exec,
    pre_fork,
    when_ready,
    worker_abort,
    worker_exit,
)
from ovms_rest.host.cores import usable_cores
from ovms_rest.worker import heartbeat, http_errors, log_escaping

__all__ = [
    "child_exit",
    "control_socket_disable",
    "keepalive",
    "nworkers_changed",
    "on_reload",
    "on_starting",
    "post_fork",
    "post_worker_init",
    "pre_exec",
    "pre_fork",
    "preload_app",
    "when_ready",
    "worker_abort",
    "worker_class",
    "worker_exit",
    "workers",
    "wsgi_app",
]

wsgi_app = "ovms_rest.app:get_app()"
worker_class = "ovms_rest.worker.worker.Worker"
# Proxies keep idle connections for 60 s or longer; the client side should close them first.
keepalive = 75
# The models are loaded by the arbiter, once for all workers.
preload_app = True
workers = int(os.environ.get("WEB_CONCURRENCY") or usable_cores())
# By default gunicorn's path is the same for all instances of a user.
control_socket_disable = not any(
    "--control-socket" in argument for argument in (*sys.argv, os.environ.get("GUNICORN_CMD_ARGS", ""))
)

heartbeat.install()
http_errors.install()
log_escaping.install()
