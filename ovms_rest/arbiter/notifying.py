"""Notifications to systemd (sd_notify(3)): READY=1 once the workers serve, WATCHDOG=1 only while one of them does.

gunicorn itself reports READY=1 before it has forked a worker. Here the arbiter takes NOTIFY_SOCKET out of its
environment before that, so that gunicorn sends nothing, and neither do workers or the nodes of pipelines.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Any

log = logging.getLogger("gunicorn.error.ovms_rest")

# systemd reads notifications at once unless it is stuck; a queue that stays full must not stop the arbiter.
_SEND_SECONDS = 1.0
# A watchdog that is due sooner than a model may take to be compiled in the arbiter would end a service that serves.
_LOADS = 2


class Notifier:
    """What sends notifications from this process, if systemd started it and wants any."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take systemd's variables out of the environment, where child processes would inherit them."""
        self._address = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        # An arbiter that SIGUSR2 started has the variables, and takes over the duties, of the first one.
        is_meant = pid in ("", str(os.getpid()), environ.get("GUNICORN_PID"))
        self._watchdog_seconds = int(microseconds or 0) / 1e6 if is_meant else 0.0
        self._pid = os.getpid()
        self._is_ready = self._is_stopping = False
        self._status = ""
        self._kick_at = 0.0

    def _send(self, *assignments: str) -> None:
        """Send one notification. A failure is logged: systemd would wait for it in vain."""
        if not self._address or os.getpid() != self._pid:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_SECONDS)
                sock.connect(address)
                sock.send("\n".join(assignments).encode())
        except OSError as error:
            log.error("cannot notify systemd of %s: %s", assignments[0], error)

    def report_ready(self, load_timeout_seconds: int) -> None:
        """Report, once, that the workers serve.

        The watchdog gets the time that a model may take to load, during which the arbiter cannot report.
        """
        if self._is_ready:
            return
        self._is_ready = True
        watchdog = []
        if self._watchdog_seconds:
            self._watchdog_seconds = max(self._watchdog_seconds, _LOADS * load_timeout_seconds)
            watchdog = [f"WATCHDOG_USEC={int(self._watchdog_seconds * 1e6)}"]
        self._send("READY=1", *watchdog)

    def report_status(self, status: str) -> None:
        """Report what `systemctl status` shows, when it has changed."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def reload(self, reload: Callable[[], None]) -> None:
        """Reload, and report its beginning and its end."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            reload()
        finally:
            if self._is_ready:  # otherwise it is the start that is not over
                self._send("READY=1")

    def kick(self) -> None:
        """Report that the service works, often enough for the watchdog and no more than once a second."""
        now = time.monotonic()
        if self._watchdog_seconds and self._is_ready and now >= self._kick_at:
            self._kick_at = now + max(1.0, self._watchdog_seconds / 4)
            self._send("WATCHDOG=1")

    def report_end(self, successor: int) -> None:
        """Report, once, that the service ends, or that the arbiter which SIGUSR2 started is the main process now."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send(f"MAINPID={successor}" if successor else "STOPPING=1")


def install(arbiter: Any) -> None:
    """Have an arbiter that has a `notifier` report what it does."""
    manage, murder, reload = arbiter.manage_workers, arbiter.murder_workers, arbiter.handle_hup

    def manage_workers() -> None:
        manage()
        if arbiter.spawning.is_up:
            arbiter.notifier.report_ready(arbiter.app.wsgi().settings.load_timeout_seconds)
            arbiter.notifier.report_status(_describe(arbiter))

    def murder_workers() -> None:
        """Kill hanging workers; called in every loop of the arbiter, it also keeps the watchdog quiet."""
        murder()
        if any(is_responsive(worker, arbiter.timeout) for worker in arbiter.WORKERS.values()):
            arbiter.notifier.kick()

    arbiter.manage_workers, arbiter.murder_workers = manage_workers, murder_workers
    arbiter.handle_hup = lambda: arbiter.notifier.reload(reload)


def is_responsive(worker: Any, timeout: float) -> bool:
    """Return whether a worker infers, and has shown a sign of life within gunicorn's `timeout`, if there is one."""
    is_alive = not timeout or time.monotonic() - worker.tmp.last_update() <= timeout
    return bool(is_alive and worker.row.is_ready() and not worker.is_control)


def _describe(arbiter: Any) -> str:
    fault = arbiter.spawning.fault
    return f"{arbiter.app.wsgi().describe()}{'; ' if fault else ''}{fault}"
