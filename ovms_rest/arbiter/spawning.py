"""Starting and replacing workers, in place of gunicorn's own way.

gunicorn ends the service when it cannot fork or when a worker exits with status 3 or 4, for whatever reason, and
immediately and endlessly replaces a worker that dies before it is ready. Here the arbiter keeps the running workers.
While no worker becomes ready it starts one at a time, with growing pauses, and logs the reason once. The service ends
only if no worker becomes ready at its start.
"""

import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gunicorn.arbiter
from gunicorn.errors import HaltServer

from ovms_rest.arbiter.crashes import describe_code, find_death, find_hang
from ovms_rest.arbiter.memory_limit import FreshSize, MemoryLimit
from ovms_rest.arbiter.pauses import Pauses
from ovms_rest.host import throwaway
from ovms_rest.log import log
from ovms_rest.shared_memory.crash_table import make_hang_rule
from ovms_rest.shared_memory.failure_note import BOOT_ERROR, FailureNote, describe
from ovms_rest.shared_memory.table import WorkerTable
from ovms_rest.worker.worker import DRAIN_SECONDS, TICK_SECONDS

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

# After this many failures in a row the arbiter no longer waits for new workers, but keeps trying.
MAX_FAILURES = 3

_METHODS = (
    "kill_worker",
    "manage_workers",
    "reap_workers",
    "spawn_worker",
    "spawn_workers",
    "stop",
    "wait_for_signals",
)
_POLL_SECONDS = 0.02
_LOOP_SECONDS = 0.1  # the longest turn of the arbiter's loop while it waits for workers to become ready
_RETIRE_SECONDS = 0.5


class Spawning:
    """The workers of an arbiter: the number missing, the time of the next fork, and their generations."""

    def __init__(
        self,
        arbiter: Any,
        table: WorkerTable,
        max_worker_memory: int = 0,
        note_opened: Callable[[float], None] = lambda born: None,
    ) -> None:
        """Replace the methods of the arbiter; `max_worker_memory` is in bytes, 0 for no limit.

        `note_opened` is called with the monotonic time before the fork of a worker that has opened all models.
        """
        self.memory = MemoryLimit(max_worker_memory)
        self._arbiter = arbiter
        self._table = table
        self._note_opened = note_opened
        self._pauses = Pauses()
        self._reason = ""  # of the last failure
        self._has_served = False
        self._is_final = False  # whether a worker failed for a reason that would make another fail, too
        self._is_up = False
        self._old: set[int] = set()  # workers to end once the new generation, or the successor of one, is ready
        self._outgrown = 0  # the process id of a worker above the memory limit
        self._outgrown_at = 0.0
        self._fork = arbiter.spawn_worker
        self._manage = arbiter.manage_workers
        self._wait = arbiter.wait_for_signals
        self._kill = arbiter.kill_worker
        self._stop = arbiter.stop
        for name in _METHODS:
            setattr(arbiter, name, getattr(self, name))

    @property
    def fault(self) -> str:
        """Why the newest generation does not serve yet; "" if it does."""
        if not self._old or self._outgrown:
            return ""
        reason = self._reason.partition("\n")[0]
        return f"new workers do not become ready, so the previous ones keep serving, and the service retries: {reason}"

    @property
    def is_up(self) -> bool:
        """Whether all workers have been ready together, or one that infers while others failed."""
        if not self._is_up:
            is_inferring = any(worker.row.is_ready() and not worker.is_control for worker in self._current())
            self._is_up = is_inferring and (self._is_renewed() or self._pauses.failures > 0)
        return self._is_up

    # --- Methods of gunicorn's arbiter

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        """Wait as gunicorn does, but for a shorter time while workers are starting."""
        is_expecting = self._pauses.failures or self._old or not self._is_up
        signals: list[int] = self._wait(min(timeout, _LOOP_SECONDS) if is_expecting else timeout)
        return signals

    def manage_workers(self) -> None:
        """Fork missing workers, and end surplus ones and those of an old generation.

        Raises HaltServer if the start has failed.
        """
        self._look()
        if not self._old:
            if len(self._arbiter.WORKERS) >= self._arbiter.num_workers:
                self.spawn_workers()  # gunicorn also counts draining workers
            self._manage()  # which calls spawn_workers
            self._replace_outgrown()
            return
        self.spawn_workers()
        if not self._is_renewed():
            return
        if self._outgrown:
            self._end_outgrown()
        else:
            log.info("the new workers are ready")
            self._retire()

    def spawn_workers(self) -> None:
        """Fork missing workers; after a failure one at a time, and only once the pause is over."""
        self._note_draining()
        for _ in range(self._arbiter.num_workers - len(self._current())):
            if not self._pauses.failures:
                self.spawn_worker()
            elif self._pauses.is_over() and all(worker.row.was_ready() for worker in self._current()):
                self.spawn_worker()
                return

    def spawn_worker(self) -> None:
        """Fork a worker, or log the reason of a failure, of which nothing is left.

        Termination signals are blocked until the hook post_fork: Python drops those that reach a process between the
        fork and its first instruction in Python.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            self._fork()
        except Exception as error:  # no processes, descriptors, memory or slots left, or a failing user hook
            if os.getpid() != self._arbiter.pid:
                os._exit(BOOT_ERROR)
            self._table.keep(worker.row for worker in self._arbiter.WORKERS.values())
            self._fail(f"cannot start a worker: {describe(error)}")
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def kill_worker(self, pid: int, number: int) -> None:
        """Send a signal to a worker, and note a termination signal."""
        worker = self._arbiter.WORKERS.get(pid)
        if worker is not None and number in ENDING:
            worker.is_ending = True
        self._kill(pid, number)

    def stop(self, graceful: bool = True) -> None:
        """Stop as gunicorn does, but by the monotonic clock.

        gunicorn kills its workers once the time of day has passed the graceful timeout, which may be set meanwhile.
        """
        gunicorn.arbiter.time = SimpleNamespace(**{**vars(time), "time": time.monotonic})
        try:
            self._stop(graceful)
        finally:
            gunicorn.arbiter.time = time

    def reap_workers(self) -> None:
        """Reap workers and other children, but not throwaway processes, which `host.throwaway` waits for."""
        for pid, worker in list(self._arbiter.WORKERS.items()):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # reaped by a user hook
                ended, status = pid, 0
            if ended:
                self._bury(worker, status)
        self._reap_others()

    def _reap_others(self) -> None:
        """Reap the arbiter that SIGUSR2 started, and orphans adopted by an arbiter with process id 1."""
        arbiter = self._arbiter
        while True:
            try:
                child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if child is None or child.si_pid in throwaway.running or child.si_pid in arbiter.WORKERS:
                return
            _, status = os.waitpid(child.si_pid, 0)
            if child.si_pid == arbiter.reexec_pid:
                arbiter.reexec_pid = 0
            elif child.si_pid == arbiter.dirty_arbiter_pid:
                arbiter.handle_dirty_arbiter_exit(child.si_pid, status)
            else:
                log.debug("reaped process %s, which was not a worker", child.si_pid)

    def _bury(self, worker: Any, status: int) -> None:
        arbiter = self._arbiter
        del arbiter.WORKERS[worker.pid]
        code = os.waitstatus_to_exitcode(status)
        is_failure = not (worker.row.was_ready() or worker.is_ending or _is_opening(worker))
        self._old.discard(worker.pid)
        if worker.pid == self._outgrown:  # died before its successor was ready
            self._outgrown = 0
        if worker.row.was_ready():
            self._note_ready(worker)
        reason = worker.failure.take()
        worker.tmp.close()
        if worker.aborted:
            inferring = arbiter.num_workers - bool(arbiter.control_sockets)
            worker.death = find_hang(worker.was_stopped, make_hang_rule(inferring, arbiter.timeout))
        else:
            worker.death = find_death(code, worker.is_ending)
            if not reason:
                _log_end(worker.pid, code)
        try:
            arbiter.cfg.child_exit(arbiter, worker)
        except Exception:
            log.exception("exception in the child_exit hook")
        if reason and not is_failure:
            log.error("%s", reason)
        if is_failure:
            self._fail(reason or f"a worker ended with {describe_code(code)} before it was ready", code > 0)

    # --- Failures

    def _fail(self, reason: str, is_final: bool = False) -> None:
        """Count and log a failure; after a final one, the start is not tried again."""
        self._pauses.fail()
        if reason != self._reason:
            self._reason = reason
            log.error("%s", reason)
        self._is_final = self._is_final or is_final

    def _look(self) -> None:
        """Note workers that became ready. Raises HaltServer if the start has failed."""
        workers = self._arbiter.WORKERS.values()
        for worker in workers:
            if worker.row.was_ready():
                self._note_ready(worker)
        # Others may become ready while one has failed. At the start none has been ready, so those left are starting.
        is_over = self._is_final or self._pauses.failures >= MAX_FAILURES
        if is_over and not self._has_served and not self._current():
            raise HaltServer("no worker became ready: " + self._reason.partition("\n")[0], BOOT_ERROR)
        if self._pauses.failures and not self._old and self._is_renewed():  # fewer workers are wanted now
            self._forget_failures()

    def _note_ready(self, worker: Any) -> None:
        self._has_served = True
        self._note_opened(worker.born)
        if self._pauses.failures and worker.born > self._pauses.failed_at:
            count = self._pauses.failures
            log.info("workers start again after %d failed attempt%s", count, "" if count == 1 else "s")
            self._forget_failures()

    def _note_draining(self) -> None:
        """Note workers that drain without a signal of the arbiter, so that each is replaced while it drains.

        They have served `max_requests`, a model became unusable in them, or an operator sent them SIGTERM.
        """
        for worker in self._arbiter.WORKERS.values():
            if worker.row.was_ready() and not worker.row.is_ready() and not worker.is_ending:
                worker.is_ending = True
                worker.is_control = False  # the successor takes the control address
                worker.age = 0  # gunicorn ends the oldest surplus worker

    def _forget_failures(self) -> None:
        self._pauses.reset()
        self._reason = ""

    # --- Memory

    def _replace_outgrown(self) -> None:
        """Fork a successor for one worker above the memory limit, unless workers are failing, missing or draining."""
        workers = list(self._arbiter.WORKERS.values())
        if (
            self._pauses.failures
            or len(workers) != self._arbiter.num_workers
            or not all(worker.row.is_ready() and not worker.is_ending for worker in workers)
        ):
            return
        worker = self.memory.find_outgrown(workers)
        if worker is None:
            return
        self._old, self._outgrown, self._outgrown_at = {worker.pid}, worker.pid, time.monotonic()
        worker.is_control = False  # the successor takes the control address
        worker.age = 0  # gunicorn ends the oldest surplus worker
        self.spawn_workers()

    def _end_outgrown(self) -> None:
        """End the worker above the memory limit, whose successor is ready."""
        took = time.monotonic() - self._outgrown_at
        log.info("worker %s ends; its successor was ready after %.1f s", self._outgrown, took)
        self._table.count_outgrown()
        self.memory.pause(took)
        for pid in self._old:
            self._arbiter.kill_worker(pid, signal.SIGTERM)
        self._old, self._outgrown = set(), 0

    # --- Generations

    def renew(self) -> None:
        """Replace all workers by a new generation; if that fails, the old one serves and `manage_workers` retries."""
        arbiter = self._arbiter
        self._forget_failures()
        self.memory.forget()
        self._old, self._outgrown = set(arbiter.WORKERS), 0
        for pid, worker in list(arbiter.WORKERS.items()):
            if not worker.row.was_ready():  # of a generation that failed, or draining
                arbiter.kill_worker(pid, signal.SIGTERM)
        while not self._is_renewed():
            self.spawn_workers()
            time.sleep(_POLL_SECONDS)
            arbiter.murder_workers()
            arbiter.reap_workers()
            if is_shutdown_requested(arbiter):
                break
            if self._pauses.failures >= MAX_FAILURES:
                log.error("the new workers do not become ready; the previous ones keep serving")
                return
        self._retire()

    def _current(self) -> list[Any]:
        """Return the workers of the newest generation, without those that are ending."""
        workers = self._arbiter.WORKERS.items()
        return [worker for pid, worker in workers if pid not in self._old and not worker.is_ending]

    def _is_renewed(self) -> bool:
        """Return whether the newest generation is complete and ready."""
        current = self._current()
        for worker in current:
            if worker.row.was_ready():
                self._note_ready(worker)
        return len(current) >= self._arbiter.num_workers and all(worker.row.is_ready() for worker in current)

    def _retire(self) -> None:
        """Drain the old generation, and wait until it accepts no more requests.

        A draining worker accepts one more request on each of its connections for a while. Requests sent after that get
        responses of the new generation alone. gunicorn's own workers do not report this, but end.
        """
        arbiter = self._arbiter
        old, self._old = self._old & arbiter.WORKERS.keys(), set()
        deadline = time.monotonic() + DRAIN_SECONDS + TICK_SECONDS + _RETIRE_SECONDS
        for pid in old:
            arbiter.kill_worker(pid, signal.SIGTERM)
        while time.monotonic() < deadline and not is_shutdown_requested(arbiter):
            arbiter.reap_workers()
            if all(worker.row.is_closed() for pid, worker in arbiter.WORKERS.items() if pid in old):
                break
            time.sleep(_POLL_SECONDS)


def prepare(worker: Any) -> None:
    """Set the attributes of a worker that this module reads, before the fork."""
    worker.failure = FailureNote()
    worker.fresh_size = FreshSize()
    worker.born = time.monotonic()
    worker.is_ending = False
    worker.was_stopped = False


def is_shutdown_requested(arbiter: Any) -> bool:
    """Return whether a termination signal is queued; the arbiter must not wait for new workers then."""
    numbers = []
    while not arbiter.SIG_QUEUE.empty():
        numbers.append(arbiter.SIG_QUEUE.get())
    for number in numbers:
        arbiter.SIG_QUEUE.put(number)
    return any(number in ENDING for number in numbers)


def _is_opening(worker: Any) -> bool:
    """Return whether a worker died while it opened a model, which the hooks count."""
    return bool(worker.opening[0])


def _log_end(pid: int, code: int) -> None:
    if code == -signal.SIGKILL:
        log.error("worker %s was killed by SIGKILL; the system may be out of memory", pid)
    elif code not in (0, -signal.SIGTERM):
        log.error("worker %s ended with %s", pid, describe_code(code))
