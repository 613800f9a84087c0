"""Handlers of signals that log a failure and keep the arbiter running.

gunicorn ends the service when its settings cannot be read again, an address cannot be listened on, a log file cannot
be reopened, or the pid file cannot be renamed after an upgrade. Here each of these is logged, and the service continues
unchanged.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from gunicorn.glogging import loggers

from ovms_rest.log import log
from ovms_rest.shared_memory.failure_note import describe
from ovms_rest.worker.streams import provide_logs

# Signals whose handling may fail without ending the service; `control` is the message of workers.
_GUARDED = ("chld", "cld", "control", "hup", "ttin", "ttou", "usr1", "usr2", "winch")
_SETTINGS = ("cfg", "worker_class", "address", "timeout", "proc_name", "num_workers", "tls")


def guard(arbiter: Any) -> None:
    """Replace the methods that handle these signals, reload, reopen log files, and complete an upgrade."""
    arbiter.reload = partial(_reload, arbiter, arbiter.reload)
    arbiter.maybe_promote_master = partial(_promote, arbiter.maybe_promote_master)
    arbiter.log.reopen_files = partial(_reopen_files, arbiter.log.reopen_files)
    for name in _GUARDED:
        handler = f"handle_{name}"
        setattr(arbiter, handler, partial(_handle, arbiter, name, getattr(arbiter, handler)))


def _handle(arbiter: Any, name: str, handle: Callable[[], None]) -> None:
    try:
        handle()
    except Exception:
        if os.getpid() != arbiter.pid:
            raise
        log.exception("error while handling %s; the service continues", name)


def _promote(promote: Callable[[], None]) -> None:
    """Complete an upgrade once the first arbiter is gone; only its last step, the pid file, may fail."""
    try:
        promote()
    except Exception as error:
        log.error("there is no pid file after the upgrade; SIGHUP tries to write it again: %s", describe(error))


def commit(arbiter: Any) -> None:
    """Drop the previous settings, before workers are forked that would inherit their sockets."""
    for sock in arbiter.kept_sockets or ():
        sock.close()
    arbiter.kept_sockets = None


def _reload(arbiter: Any, reload: Callable[[], None]) -> None:
    """Reload; restore the previous settings if the new ones cannot be used."""
    before = {name: getattr(arbiter, name) for name in _SETTINGS}
    environ, listeners = dict(os.environ), list(arbiter.LISTENERS)
    arbiter.kept_sockets = []
    try:
        # gunicorn closes the listening sockets before it knows that it can open others.
        arbiter.kept_sockets += [listener.sock.dup() for listener in listeners]
        reload()
    except (Exception, SystemExit) as error:
        if os.getpid() != arbiter.pid:
            raise
        reason = describe(error) if isinstance(error, Exception) else "see the lines above"
        if arbiter.kept_sockets is None:  # only the last step failed: writing the pid file
            log.error("the reload was not completed: %s", reason)
            return
        log.error("the reload failed; the service keeps its previous settings: %s", reason)
        os.environ.clear()
        os.environ.update(environ)
        _restore_listeners(arbiter, listeners)
        _restore_settings(arbiter, before)


def _restore_listeners(arbiter: Any, listeners: list[Any]) -> None:
    for listener in arbiter.LISTENERS:
        if listener not in listeners:
            listener.close()
    arbiter.LISTENERS = listeners
    for listener, sock in zip(listeners, arbiter.kept_sockets, strict=False):  # empty if none could be kept
        if listener.sock is None:
            listener.sock = sock
        else:
            sock.close()
    arbiter.kept_sockets = None


def _restore_settings(arbiter: Any, before: dict[str, Any]) -> None:
    for name, value in before.items():
        setattr(arbiter, name, value)
    arbiter.app.cfg = arbiter.cfg
    try:
        arbiter.log.setup(arbiter.cfg)
    except Exception:  # a log file that cannot be opened any more, say
        log.exception("cannot restore the previous log settings")


def _reopen_files(reopen: Callable[[], None]) -> None:
    """Reopen the log files if all of them can be opened: gunicorn closes them first."""
    files = {
        handler.baseFilename
        for logger in loggers()
        for handler in logger.handlers
        if isinstance(handler, logging.FileHandler)
    }
    provide_logs()
    try:
        for file in files:  # opening a named pipe would wait for a reader
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666))
    except OSError as error:
        log.error("the log files are not reopened: %s", describe(error))
        return
    reopen()
