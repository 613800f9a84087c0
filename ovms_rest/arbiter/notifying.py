"""Notifications to systemd (sd_notify(3)): READY=1 once the workers serve, WATCHDOG=1 only while one of them does.

gunicorn itself reports READY=1 before it has forked a worker. Here the arbiter takes NOTIFY_SOCKET out of its
environment before that, so that gunicorn sends nothing, and neither do workers or the nodes of pipelines.
"""

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from ovms_rest.log import log

# systemd reads notifications immediately unless it hangs; a queue that stays full must not stop the arbiter.
_SEND_SECONDS = 1.0
# A watchdog shorter than the time a model may take to compile in the arbiter would end a healthy service.
_LOADS = 2


class Notifier:
    """Sends notifications from this process, if systemd started it and expects them."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Remove systemd's variables from the environment, which child processes inherit."""
        self._address = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        # An arbiter that SIGUSR2 started has the variables of the first one, and takes over its notifications.
        is_meant = pid in ("", str(os.getpid()), environ.get("GUNICORN_PID"))
        self._watchdog_seconds = int(microseconds or 0) / 1e6 if is_meant else 0.0
        self._pid = os.getpid()
        self._is_ready = self._is_stopping = False
        self._status = ""
        self._kick_at = 0.0

    def _send(self, *assignments: str) -> None:
        """Send one notification; log a failure, as systemd waits for it."""
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
        """Report once that the workers serve.

        The watchdog's time is extended by the time that a model may take to load, while the arbiter cannot report.
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
        """Report a new status, as shown by `systemctl status`."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def reload(self, reload: Callable[[], None]) -> None:
        """Reload, and report the beginning and the end of it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            reload()
        finally:
            if self._is_ready:  # else the start is not complete
                self._send("READY=1")

    def kick(self) -> None:
        """Report that the service is alive, often enough for the watchdog and at most once a second."""
        now = time.monotonic()
        if self._watchdog_seconds and self._is_ready and now >= self._kick_at:
            self._kick_at = now + max(1.0, self._watchdog_seconds / 4)
            self._send("WATCHDOG=1")

    def report_end(self, successor: int) -> None:
        """Report once that the service is stopping, or that the arbiter started by SIGUSR2 is the main process now."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send(f"MAINPID={successor}" if successor else "STOPPING=1")


def install(arbiter: Any) -> None:
    """Extend the methods of an arbiter that has a `notifier` by notifications."""
    manage, murder, reload = arbiter.manage_workers, arbiter.murder_workers, arbiter.handle_hup

    def manage_workers() -> None:
        manage()
        if arbiter.spawning.is_up:
            arbiter.notifier.report_ready(arbiter.settings.load_timeout_seconds)
            arbiter.notifier.report_status(_describe(arbiter))

    def murder_workers() -> None:
        """Kill hanging workers, and notify the watchdog: the arbiter calls this in every turn of its loop."""
        murder()
        if any(is_responsive(worker, arbiter.timeout) for worker in arbiter.WORKERS.values()):
            arbiter.notifier.kick()

    arbiter.manage_workers, arbiter.murder_workers = manage_workers, murder_workers
    arbiter.handle_hup = lambda: arbiter.notifier.reload(reload)


def is_responsive(worker: Any, timeout: float) -> bool:
    """Return whether a worker infers and was alive within gunicorn's `timeout`, if that is set."""
    is_alive = not timeout or time.monotonic() - worker.tmp.last_update() <= timeout
    return bool(is_alive and worker.row.is_ready() and not worker.is_control)


def _describe(arbiter: Any) -> str:
    fault = arbiter.spawning.fault
    return f"{arbiter.app.wsgi().describe()}{'; ' if fault else ''}{fault}"
