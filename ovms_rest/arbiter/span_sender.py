"""The arbiter's side of the process that sends spans: starting it, starting it again, its log lines, and its end."""

import os
import subprocess
import sys
import time
from typing import Any

from ovms_rest.arbiter.pauses import LONGEST_SECONDS, Pauses
from ovms_rest.host import throwaway
from ovms_rest.log import log
from ovms_rest.tracing.sender import END_SECONDS
from ovms_rest.tracing.tracing import Tracing

_PROGRAM = "from ovms_rest.tracing.sender import main; main()"
_READ_BYTES = 65536
# How long the process may take to end, beyond its own limit, before it is killed.
_PATIENCE_SECONDS = 0.5


class SpanSender:
    """The process; the service goes on while there is none, and spans that find no room are dropped."""

    def __init__(self, tracing: Tracing, cfg: Any) -> None:
        """`cfg` are gunicorn's settings, whose user the process runs as."""
        self._channel = tracing.channel
        self._cfg = cfg
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pauses = Pauses()
        self._reason = ""  # of the last failure
        self._has_ended = False

    def look(self) -> None:
        """Start the process if there is none, and log what it reports."""
        if self._has_ended:
            return
        if self._process is not None:
            has_ended = self._process.poll() is not None
            self._log_lines(self._process)
            if not has_ended:
                return
            self._bury(self._process)
        if self._pauses.is_over():
            self._start()

    def end(self) -> None:
        """End the process, which first sends what it has for a moment; called when the workers are gone."""
        self._has_ended = True
        self._channel.close()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(END_SECONDS + _PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log_lines(process)
        throwaway.running.discard(process.pid)

    def _start(self) -> None:
        channel, cfg = self._channel, self._cfg
        descriptors = (channel.receiver.fileno(), channel.memory)
        user: dict[str, Any] = {}
        if os.geteuid() == 0 and (cfg.uid, cfg.gid) != (0, os.getegid()):
            user = {"user": cfg.uid, "group": cfg.gid, "extra_groups": ()}
        try:
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *map(str, (*descriptors, channel.size))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                process_group=0,  # signals of a terminal do not reach it; it ends after the workers
                **user,
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._fail(f"cannot start the process that sends spans: {error}")
            return
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        throwaway.running.add(process.pid)
        self._started_at = time.monotonic()

    def _log_lines(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        try:
            printed = os.read(process.stdout.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        for line in printed.decode(errors="replace").splitlines():
            log.warning("traces: %s", line)

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        """Note that the process has ended by itself."""
        throwaway.running.discard(process.pid)
        assert process.stdout is not None
        process.stdout.close()
        self._process = None
        if time.monotonic() - self._started_at > LONGEST_SECONDS:
            self._pauses.reset()
            self._reason = ""
        code = process.returncode
        self._fail(f"the process that sends spans ended with {f'signal {-code}' if code < 0 else f'status {code}'}")

    def _fail(self, reason: str) -> None:
        self._pauses.fail()
        if reason != self._reason:
            self._reason = reason
            log.error("%s; it is started again", reason)
