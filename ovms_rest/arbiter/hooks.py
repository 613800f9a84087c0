"""gunicorn's server hooks (https://docs.gunicorn.org/en/stable/settings.html#server-hooks)."""

import contextlib
import gc
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from gunicorn.systemd import SD_LISTEN_FDS_START

from ovms_rest.arbiter import hangs, notifying
from ovms_rest.arbiter.addresses import AddressError, SocketFiles, check_addresses, check_paths
from ovms_rest.arbiter.control_address import ControlAddress, move, take_activated
from ovms_rest.arbiter.crashes import Death
from ovms_rest.arbiter.guarding import commit, guard
from ovms_rest.arbiter.hook_joining import join_hooks, joined
from ovms_rest.arbiter.memory_limit import MemoryLimit
from ovms_rest.arbiter.reloading import Managed
from ovms_rest.arbiter.span_sender import SpanSender
from ovms_rest.arbiter.spawning import ENDING, Spawning, is_shutdown_requested, prepare
from ovms_rest.arbiter.tls import TlsError, load_tls
from ovms_rest.arbiter.urls import find_port, find_url, name_sockets
from ovms_rest.host.cores import usable_cores
from ovms_rest.host.priority import begin_to_serve, end_quietly, lowered, restore
from ovms_rest.log import log
from ovms_rest.protocol.routes import read_script_name
from ovms_rest.settings import PREFIX, read_settings
from ovms_rest.shared_memory.mailbox import CONTROL
from ovms_rest.shared_memory.messages import Change
from ovms_rest.worker import streams
from ovms_rest.worker.access_log import provide_file
from ovms_rest.worker.worker import Worker

_NAME_BYTES = 65536


class App(Protocol):
    """The application as the hooks use it; they take its `managed` values over when the arbiter starts."""

    managed: Managed

    def set_ports(self, service: int | None, control: int | None) -> None:
        """Note the TCP ports of the service and of the control address, before workers are forked."""

    def describe(self) -> str:
        """Return how many models serve."""

    def open(self, slot: int, is_control: bool, opening: Callable[[str], None], retire: Callable[[], None]) -> None:
        """Open all models in a worker."""

    def release(self, slot: int, death: Death) -> str:
        """Release what a worker that is gone has noted; return a line for the log if it died during an inference."""


def _app(arbiter: Any) -> App:
    app: App = arbiter.app.wsgi()
    return app


def nworkers_changed(arbiter: Any, count: int, previous: int | None) -> None:
    """Prepare what is needed before any model is loaded: gunicorn calls this hook first.

    That is a log that does not block, the listen addresses, the certificate and the control address. The start ends if
    one of them fails.
    """
    join_hooks(arbiter.cfg)
    if previous is not None:
        _check_new_addresses(arbiter)
        return
    arbiter.notifier = notifying.Notifier(os.environ)
    if os.getpid() == 1:
        # The kernel drops signals for which the first process of a container has no handler. gunicorn sets its handlers
        # when the models are loaded, and until then only SIGKILL would end the process.
        for number in ENDING:
            signal.signal(number, _exit_on_signal)
    streams.install(arbiter.cfg.uid, arbiter.cfg.gid)
    address = _control_bind(arbiter)
    with _ending_without(address):
        activated = take_activated(address, os.environ)
    with _ending_unusable():
        check_addresses(arbiter.cfg, os.environ)
        arbiter.tls = load_tls(arbiter.cfg)
    arbiter.checked_addresses = arbiter.cfg.address
    if count > (cores := usable_cores()):
        log.warning("more workers (%d) than usable cores (%d): the others gain nothing and take memory", count, cores)
    arbiter.control_sockets = []
    with _ending_without(address):
        arbiter.control_address = ControlAddress(address, arbiter.cfg, os.environ, activated)


def _check_new_addresses(arbiter: Any) -> None:
    """Check the paths of new settings before gunicorn takes them. Raises AddressError."""
    if arbiter.cfg.address != arbiter.checked_addresses:
        check_paths(arbiter.cfg.address, name_sockets(arbiter.LISTENERS))
        arbiter.checked_addresses = arbiter.cfg.address


def _exit_on_signal(number: int, frame: object) -> None:
    """Exit with the code by which a shell reports a signal."""
    sys.exit(128 + number)


@contextlib.contextmanager
def _ending_unusable() -> Iterator[None]:
    """Exit if a listen address or the certificate cannot be used."""
    try:
        yield
    except (AddressError, TlsError) as error:
        log.error("%s", error)
        sys.exit(1)


@contextlib.contextmanager
def _ending_without(address: str) -> Iterator[None]:
    """Exit if the control address cannot be used."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        log.error("cannot listen on %s (%sCONTROL_BIND): %s", address, PREFIX, reason)
        sys.exit(1)


def _control_bind(arbiter: Any) -> str:
    """Return the setting of the control address, which gunicorn's `raw_env` may contain."""
    return str(arbiter.cfg.env.get(f"{PREFIX}CONTROL_BIND") or os.environ.get(f"{PREFIX}CONTROL_BIND", ""))


@joined
def on_starting(arbiter: Any) -> None:
    """Extend the arbiter by changes that workers ask for, replacement of workers, and the control address.

    The control worker, if any, is counted in addition to the others.
    """
    if not hasattr(arbiter, "control_address"):
        log.error("the hook nworkers_changed of the settings file has to call ovms_rest.arbiter.hooks.nworkers_changed")
        sys.exit(1)
    begin_to_serve()
    managed = arbiter.managed = _app(arbiter).managed
    arbiter.settings = managed.settings
    managed.log_levels.install()
    arbiter.SIG_NAMES = {**arbiter.SIG_NAMES, CONTROL: "control"}
    arbiter.handle_control = lambda: make_changes(arbiter)
    limit, forget_deaths = managed.settings.max_worker_memory_bytes, managed.reloading.forget_deaths
    arbiter.spawning = Spawning(arbiter, managed.table, limit, forget_deaths)
    signal.signal(CONTROL, arbiter.signal)
    _provide_access_log(arbiter)
    arbiter.span_sender = _prepare_spans(arbiter)
    for name, function in _METHODS.items():
        setattr(arbiter, name, partial(function, arbiter, getattr(arbiter, name)))
    if arbiter.cfg.reuse_port and os.environ.get("GUNICORN_FD") == "":
        # After SIGUSR2: workers open their own sockets and inherit none, but gunicorn expects a number here.
        os.environ["GUNICORN_FD"] = "0"
    guard(arbiter)
    hangs.install(arbiter)
    notifying.install(arbiter)
    for name in ("handle_hup", "handle_control"):
        setattr(arbiter, name, partial(_give_way, getattr(arbiter, name)))
    with _ending_without(_control_bind(arbiter)):
        arbiter.control_address.listen(arbiter.log)
    arbiter.control_sockets = arbiter.control_address.sockets
    if arbiter.control_sockets:
        log.info("control address: %s", ", ".join(map(str, arbiter.control_sockets)))
        _count_control_worker(arbiter)
    arbiter.socket_files = SocketFiles()
    with _ending_unusable():  # another service may have taken an address while the models were loaded
        check_addresses(arbiter.cfg, os.environ)


def _prepare_spans(arbiter: Any) -> SpanSender | None:
    """Return the owner of the process that sends spans, None if none are sent."""
    tracing = arbiter.managed.tracing
    if tracing is None:
        return None
    if not issubclass(arbiter.cfg.worker_class, Worker):
        log.warning("no traces are sent: gunicorn's %s worker records none", arbiter.cfg.worker_class_str)
        return None
    log.info("traces are sent to %s", tracing.endpoint)
    return SpanSender(tracing, arbiter.cfg)


@joined
def when_ready(arbiter: Any) -> None:
    """Log how many models serve, the listen addresses, the workers and the console's URL."""
    arbiter.socket_files.note(arbiter.LISTENERS)
    _note_ports(arbiter)
    summary, addresses = _app(arbiter).describe(), ", ".join(map(str, arbiter.LISTENERS))
    workers = arbiter.cfg.workers - bool(arbiter.control_sockets)  # one is the control worker
    line = "%s on %s, with %d worker%s; loading and unloading over HTTP: %s%s"
    console = f"; console: {_find_console(arbiter)}" if arbiter.settings.console else ""
    log.info(line, summary, addresses, workers, "" if workers == 1 else "s", arbiter.managed.permission, console)


def _note_ports(arbiter: Any) -> None:
    """Pass the ports on to the application, which the workers inherit."""
    control = find_port(name_sockets(arbiter.control_sockets))
    _app(arbiter).set_ports(find_port(name_sockets(arbiter.LISTENERS) or arbiter.cfg.address), control)


def _find_console(arbiter: Any) -> str:
    """Return the URL of the console."""
    listening = name_sockets(arbiter.control_sockets or arbiter.LISTENERS) or arbiter.cfg.address
    return find_url(listening, arbiter.cfg.is_ssl, read_script_name(os.environ.get("SCRIPT_NAME", "")) + "/console")


def _shut_down(arbiter: Any, handle: Callable[[], None]) -> None:
    """Make the shutdown known to the workers before they get a signal, so that readiness falls immediately."""
    arbiter.managed.table.set_ending()
    handle()


def _wait_for_signals(arbiter: Any, wait: Callable[..., list[int]], timeout: float = 1.0) -> list[int]:
    """Wait as the arbiter does; let it run changes, too, when another attempt of a reload is due.

    Of several SIGHUP that came during a reload one is left, since each would fork another generation and the first
    loads all that has changed. None is left if the service is to end.
    """
    if arbiter.span_sender is not None:
        arbiter.span_sender.look()
    numbers = wait(timeout)
    if any(number in ENDING for number in numbers):
        return _end_soon(arbiter, numbers)
    if signal.SIGHUP in numbers:
        first = numbers.index(signal.SIGHUP) + 1
        numbers = [*numbers[:first], *(number for number in numbers[first:] if number != signal.SIGHUP)]
    return [*numbers, CONTROL] if arbiter.managed.reloading.is_due() else numbers


def _end_soon(arbiter: Any, numbers: list[int]) -> list[int]:
    """Return a termination signal, and before it only what must not be lost: an upgrade, and changes with callers.

    The workers of those callers would wait for an outcome as long as they may. SIGINT and SIGQUIT, which end the
    service at once, take precedence over SIGTERM. A copy of the signal in the queue ends changes early.
    """
    first = next(index for index, number in enumerate(numbers) if number in ENDING)
    ending = next((number for number in numbers if number in (signal.SIGINT, signal.SIGQUIT)), signal.SIGTERM)
    arbiter.SIG_QUEUE.put(ending)
    upgrades = [number for number in numbers[:first] if number == signal.SIGUSR2]
    return [*upgrades, *([CONTROL] if CONTROL in numbers else []), ending]


def _stop(arbiter: Any, stop: Callable[[bool], None], graceful: bool = True) -> None:
    """Close the control address and the listeners, in gunicorn's place: it fails if a path has been removed.

    Paths stay if another arbiter, another service or systemd uses them.
    """
    arbiter.notifier.report_end(arbiter.reexec_pid)
    is_alone = arbiter.reexec_pid == arbiter.master_pid == 0
    arbiter.control_address.close(unlink=is_alone)
    arbiter.control_sockets = []
    if is_alone and not arbiter.systemd:
        arbiter.socket_files.remove()
    for listener in arbiter.LISTENERS:
        listener.close()
    arbiter.LISTENERS = []
    stop(graceful)
    if arbiter.span_sender is not None:
        arbiter.span_sender.end()


@joined
def pre_exec(arbiter: Any) -> None:
    """Hand the addresses over to the arbiter that SIGUSR2 starts; called in the process that becomes that arbiter.

    gunicorn declares sockets of systemd at their original descriptors, but has moved them.
    """
    end = SD_LISTEN_FDS_START + len(arbiter.LISTENERS)
    arbiter.control_address.hand_over(arbiter.cfg.env_orig, end)
    if arbiter.systemd:
        for descriptor, copy in enumerate([move(sock, end) for sock in arbiter.LISTENERS], SD_LISTEN_FDS_START):
            os.dup2(copy, descriptor)
            os.close(copy)


def _reexec(arbiter: Any, reexec: Callable[[], None]) -> None:
    """Start another arbiter, or log why that failed and continue.

    In gunicorn the forked process, not yet an arbiter, would end the workers of this one.
    """
    pid = os.getpid()
    try:
        reexec()
    except Exception as error:  # the working directory or the interpreter is gone, or there are too many processes
        log.error("cannot start another arbiter; this one keeps serving: %s", error)
        if os.getpid() != pid:
            os._exit(1)
        arbiter.reexec_pid = 0


def _give_way(handle: Callable[[], None]) -> None:
    """Run changes, and fork the workers that serve them, at a lower priority than that of workers."""
    with lowered():
        handle()


def _add_worker(arbiter: Any, handle: Callable[[], None]) -> None:
    """Add a worker that infers, also after SIGWINCH has ended all workers, the control worker included."""
    arbiter.num_workers = max(arbiter.num_workers, len(arbiter.control_sockets))
    handle()


def _remove_worker(arbiter: Any, handle: Callable[[], None]) -> None:
    """Remove a worker, but not the last one that infers; gunicorn does not know the control worker."""
    if arbiter.num_workers <= 1 + len(arbiter.control_sockets):
        log.info("no worker removed: only one infers")
        return
    handle()


def _reopen_logs(arbiter: Any, handle: Callable[[], None]) -> None:
    """Create the access log before the workers are signalled to open it."""
    _provide_access_log(arbiter)
    handle()


def _provide_access_log(arbiter: Any) -> None:
    if arbiter.settings.access_log != "none":
        provide_file(arbiter.settings.access_log_file, arbiter.cfg.uid, arbiter.cfg.gid)


# Replacements of gunicorn's methods, called with the original.
_METHODS: dict[str, Callable[..., Any]] = {
    "wait_for_signals": _wait_for_signals,
    "stop": _stop,
    "reexec": _reexec,
    **dict.fromkeys(("handle_term", "handle_int", "handle_quit"), _shut_down),
    "handle_ttin": _add_worker,
    "handle_ttou": _remove_worker,
    "handle_usr1": _reopen_logs,
}


def make_changes(arbiter: Any) -> None:
    """Run the changes that workers asked for; if they change the registry, a new generation of workers serves it.

    Clients that ask for one change after another do not keep the service from ending.
    """
    while changes := arbiter.managed.reloading.receive():
        _run(arbiter, changes, lambda has_changed: _renew(arbiter) if has_changed else arbiter.spawning.fault)
        if is_shutdown_requested(arbiter):
            return


@joined
def on_reload(arbiter: Any) -> None:
    """Load what changed, and replace all workers by a new generation with the new settings of gunicorn.

    gunicorn would fork the new workers after this hook and end the old ones, oldest first, before the new ones are
    ready. So they are forked here, and gunicorn has none to fork.

    Raises ConfigError for invalid environment variables in gunicorn's `raw_env`, with which workers would fail.
    """
    settings = read_settings(os.environ)
    streams.install(arbiter.cfg.uid, arbiter.cfg.gid)
    arbiter.managed.log_levels.install()
    try:
        arbiter.tls = load_tls(arbiter.cfg)
    except TlsError as error:
        log.error("%s; the service keeps the certificate that it has loaded", error)
    commit(arbiter)
    arbiter.socket_files.note(arbiter.LISTENERS)
    _note_ports(arbiter)
    arbiter.settings = settings
    arbiter.spawning.memory = MemoryLimit(settings.max_worker_memory_bytes)
    if arbiter.control_sockets:
        _count_control_worker(arbiter)
    _run(arbiter, [Change()], lambda has_changed: _renew(arbiter))
    arbiter.cfg.set("workers", 0)
    arbiter.worker_age = -1  # gunicorn waits for workers of a higher age


def _run(arbiter: Any, changes: list[Change], renew: Callable[[bool], str]) -> None:
    arbiter.managed.reloading.run(changes, lambda: _keep_house(arbiter), renew)


def _keep_house(arbiter: Any) -> bool:
    """Run arbiter housekeeping while models load: replace dead workers; return whether shutdown was requested."""
    arbiter.murder_workers()
    arbiter.reap_workers()
    is_ending = is_shutdown_requested(arbiter)
    if not is_ending:
        arbiter.manage_workers()
    return is_ending


def _renew(arbiter: Any) -> str:
    """Replace all workers by a new generation; return why that does not serve yet, "" if it does."""
    if is_shutdown_requested(arbiter):
        return "the service is shutting down"
    arbiter.managed.table.count_generation()
    for worker in arbiter.WORKERS.values():
        if worker.is_control:
            worker.is_control = False
            worker.age = 0
    arbiter.spawning.renew()
    fault: str = arbiter.spawning.fault
    return fault


def _count_control_worker(arbiter: Any) -> None:
    arbiter.cfg.set("workers", arbiter.cfg.workers + 1)
    arbiter.num_workers = arbiter.cfg.workers


@joined
def pre_fork(arbiter: Any, worker: Any) -> None:
    """Prepare a fork.

    The worker gets a page to note the model it opens, its slot of the worker table, and the control address if no other
    worker has it. The garbage collector ignores all objects made so far, which keeps their pages shared.
    """
    prepare(worker)
    worker.opening = mmap.mmap(-1, _NAME_BYTES)
    worker.tls = arbiter.tls
    worker.settings = arbiter.settings
    worker.tracing = arbiter.managed.tracing
    worker.row = arbiter.managed.table.take()
    worker.gives_way = any(other.row.is_ready() for other in arbiter.WORKERS.values())
    worker.is_control = False
    worker.age = 1 + _highest_age(arbiter)  # gunicorn ends the oldest first; a reload resets its own count
    if arbiter.control_sockets and not any(other.is_control for other in arbiter.WORKERS.values()):
        worker.is_control = True
        worker.row.set_control()
        worker.age = sys.maxsize  # gunicorn ends the oldest when their number is reduced
        worker.sockets = arbiter.control_sockets
    gc.freeze()


def _highest_age(arbiter: Any) -> int:
    return max((int(worker.age) for worker in arbiter.WORKERS.values() if not worker.is_control), default=0)


@joined
def post_fork(arbiter: Any, worker: Any) -> None:
    """Keep the queue of signals that arrive before the worker has its own handlers.

    A worker closes the sockets that it does not serve, which would accept connections until it has drained. With
    `reuse_port` gunicorn opens sockets for each worker, also for the control worker.
    """
    restore()
    worker.early_signals = arbiter.SIG_QUEUE
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    served = arbiter.control_sockets if worker.is_control else worker.sockets
    for sock in (*worker.sockets, *arbiter.LISTENERS, *arbiter.control_sockets):
        if sock not in served:
            sock.close()
    worker.sockets = served


@joined
def post_worker_init(worker: Any) -> None:
    """Open the models in a new worker, before it accepts connections.

    While other workers serve, the models are opened at a low priority, if that can be raised again.

    A termination signal that arrived before the worker had its own handlers went to its copy of the arbiter's. If it
    was lost there, the arbiter would wait for the worker for its whole `graceful_timeout`.
    """
    app: App = worker.wsgi
    with lowered() if worker.gives_way else contextlib.nullcontext():
        app.open(worker.row.index, worker.is_control, partial(note_opening, worker), _end_in_order)
    worker.notify()
    if worker.settings.max_worker_memory_bytes:
        worker.fresh_size.measure()
    if not isinstance(worker, Worker):  # our own sets it when it is about to accept
        worker.row.set_ready()
    while not worker.early_signals.empty():
        number = worker.early_signals.get()
        if number in ENDING:
            os.kill(os.getpid(), number)


def _end_in_order() -> None:
    """Drain and end this worker; the arbiter forks another."""
    os.kill(os.getpid(), signal.SIGTERM)


def note_opening(worker: Any, name: str) -> None:
    """Note the model that a worker opens, "" for none.

    gunicorn kills a worker that does not report within its `timeout`. A report dated ahead adds the time to open this
    model to that.
    """
    worker.opening.seek(0)
    worker.opening.write(name.encode()[: _NAME_BYTES - 1] + b"\0")
    ahead = time.monotonic() + worker.settings.load_timeout_seconds
    os.utime(worker.tmp.fileno(), (ahead, ahead))


@joined
def child_exit(arbiter: Any, worker: Any) -> None:
    """Log the requests of a worker that died; give up a model that several workers could not open."""
    managed = arbiter.managed
    if worker.row.is_ready():  # a worker that drains is not
        managed.table.count_death()
    try:
        if line := _app(arbiter).release(worker.row.index, worker.death):
            log.error("worker %s %s", worker.pid, line)
    finally:
        managed.table.free(worker.row)
    name = worker.opening[:].partition(b"\0")[0].decode(errors="ignore")
    worker.opening.close()
    if name:
        log.error("worker %s died or hung while it opened %r (model and version)", worker.pid, name)
        managed.reloading.count_death(name)


@joined
def worker_abort(worker: Any) -> None:
    """Exit from a worker that hangs: a custom node might catch the SystemExit that gunicorn raises, and go on."""
    _exit(1)


@joined
def worker_exit(arbiter: Any, worker: Any) -> None:
    """Exit from a worker immediately: after a fork of a process that used OpenVINO, a normal interpreter exit hangs.

    gunicorn calls this last in a worker, but also in the arbiter for a worker that is gone.
    """
    if os.getpid() != worker.pid:
        return
    end_quietly()
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else 1
    _exit(code if isinstance(code, int) else 0 if code is None else 1)


def _exit(code: int) -> None:
    """Exit without unwinding the frames of the arbiter that forked the worker; the standard streams may be closed."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before the service was started
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
    finally:
        os._exit(code)
