"""The gunicorn worker of the service: one thread, epoll, and the WSGI application called directly.

A turn of its loop handles the events of epoll, runs requests that do not infer immediately, and then runs one queued
inference, or a few short ones. Between turns it looks at its sockets, so that probes wait for one inference at most.

Whatever clients send, a turn takes a few milliseconds besides its inferences, or as long as those. Connections that got
no time come first in the next turn, in their order. A connection that takes a lot of time, with an upload or a body of
tiny chunks, continues a little in every turn, beside the others and not before them.
"""

import ctypes
import errno
import itertools
import math
import os
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Collection, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

from gunicorn.config import PostRequest, PreRequest
from gunicorn.http.wsgi import FileWrapper, WSGIErrorsWrapper
from gunicorn.workers.base import Worker as BaseWorker

from ovms_rest.errors import DeadlineError, TryLaterError
from ovms_rest.host.parent import end_after_parent, postpone
from ovms_rest.log import log
from ovms_rest.models.batching import parking
from ovms_rest.models.servable import Servable
from ovms_rest.protocol.encoding import encode_error
from ovms_rest.protocol.room import Room, describe_lack
from ovms_rest.protocol.routes import read_script_name
from ovms_rest.settings import Settings, cors_headers
from ovms_rest.shared_memory.failure_note import BOOT_ERROR, FailureNote
from ovms_rest.shared_memory.statistics import FailureKind, InferenceRecord
from ovms_rest.shared_memory.table import CLAIMED, WAKE, Row, wake
from ovms_rest.tracing.context import TRACE, TraceContext, name_traces_in_log, read_context_of, within
from ovms_rest.tracing.recorder import Recorder
from ovms_rest.tracing.tracing import Tracing
from ovms_rest.worker.access_log import AccessLog, access_of
from ovms_rest.worker.balance import ACCEPT_PAUSE_SECONDS, Balance
from ovms_rest.worker.connection import (
    EVENTS,
    RECEIVING,
    Buffer,
    Connection,
    Context,
    Event,
    Refused,
    Request,
    State,
    Times,
    TlsConnection,
)
from ovms_rest.worker.http1 import (
    Environ,
    HeadReader,
    Refusal,
    encode_head,
    encode_refusal,
    encode_server_lines,
    is_request_id,
)
from ovms_rest.worker.queue import NEVER, RequestQueue, Terms, read_terms

# A receive of this size takes a head with a small body in one call.
ARENA_BYTES = 64 * 1024
# Up to this size one buffer is cheaper to send than several, the copy included.
SMALL_RESPONSE = 4096
TICK_SECONDS = 1.0
# How often a worker looks whether others would serve its clients sooner; the rows of 64 workers take 20 us to read.
BALANCE_SECONDS = 0.001
# How often deferred requests are polled.
POLL_SECONDS = 0.05
# Short inferences run one after another for this time before the sockets are looked at.
INFERRING_SECONDS = 0.0005
# Everything else gets this time in a turn, or as long as the inferences of the last turn took, up to the second figure.
HANDLING_SECONDS = 0.004
LONGEST_HANDLING_SECONDS = 0.05
# Slow connections get this fraction of that time in addition.
SLOW_PART = 0.25
# At most this many connections are accepted in a turn.
ACCEPTS_PER_TURN = 32
# While draining, a worker waits this long for a last request on a connection that is kept alive.
DRAIN_SECONDS = 1.0
# While draining, a worker refuses its queued requests this long before the arbiter would kill it.
REFUSING_SECONDS = 1.0

# How much freed memory a worker keeps; half of it in one piece.
KEPT_BYTES = 64 * 2**20
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

Headers = list[tuple[str, str]]
FindBatched = Callable[[str, str | None], Servable | None]

_RETRY = {"Retry-After": "1"}


class Deferred(NamedTuple):
    """A request whose response is not ready; `is_due` returns whether it is, and the application can be run again."""

    request: Request
    is_due: Callable[[], bool]


class Worker(BaseWorker):  # type: ignore[misc]
    """Serves the sockets of the arbiter, or, as the control worker, the control address alone."""

    # Set by the arbiter's hooks before the fork.
    settings: Settings
    row: Row
    is_control: bool = False
    tls: ssl.SSLContext | None = None
    failure: FailureNote
    tracing: Tracing | None = None

    _recorder: Recorder | None = None
    _access_log: AccessLog | None = None
    _must_reopen_logs = False

    def init_process(self) -> None:
        """Become ready and serve until the end; gunicorn calls this in the forked process."""
        try:
            super().init_process()
        except Exception as error:
            if self.row.was_ready():
                raise  # gunicorn logs it
            self.failure.write(error)
            sys.exit(BOOT_ERROR)

    def init_signals(self) -> None:
        """Prepare for signals; gunicorn calls this before the models are opened, which may hang too."""
        super().init_signals()
        end_after_parent(self.ppid, self.cfg.graceful_timeout)

    def run(self) -> None:
        """Serve until the worker has to end: gunicorn's main loop of a worker."""
        self._set_up()
        self.row.set_ready()
        while self._turn():
            pass

    def _set_up(self) -> None:
        cfg, settings = self.cfg, self.settings
        # The application's check of its files for changes, and how often to call it, 0 for never.
        self.watch: Callable[[], None] | None = getattr(self.wsgi, "watch", None)
        self.poll_seconds = settings.file_system_poll_wait_seconds
        self._script_name = read_script_name(os.environ.get("SCRIPT_NAME", ""))
        self._keeps_alive = cfg.keepalive > 0
        self._max_queued = settings.max_waiting
        _keep_freed_memory()
        now = self._polled = time.monotonic()
        self._context = Context(
            HeadReader(cfg, self._script_name),
            Times(
                settings.head_timeout_seconds,
                settings.body_timeout_seconds,
                settings.send_timeout_seconds,
                cfg.keepalive,
            ),
            settings.max_body_bytes,
            settings.max_held_bytes,
            memoryview(bytearray(ARENA_BYTES)),
            self._forget,
            now,
        )
        self._tls = self.tls
        self._queue: RequestQueue[Request] = RequestQueue(_read_terms)
        self._backlog: dict[Connection, int] = {}  # with events that there was no time for
        self._idle: list[tuple[float, Connection]] = []  # some that were idle, the longest idle one last
        self._handling_seconds = HANDLING_SECONDS
        self._deferred: list[Deferred] = []
        # Of the application, unless no model infers batches: finds a version that does.
        self._find_batched: FindBatched | None = None
        self._parked = parking.members
        if getattr(self.wsgi, "has_batches", bool)():
            self._find_batched = self.wsgi.find_batched
            parking.begin()
        self._connections: dict[int, Connection] = {}
        self._draining = False
        self._is_busy = False
        self._started = now
        self._last_inferred: Collection[Connection] = ()
        self._inferring = 0  # how many parked requests there were when the current batch began
        self._inferred_until = -math.inf
        self._balance_again = now
        self._next_tick = now
        self._next_watch = now if self.poll_seconds else math.inf
        self._observed = _is_observed(cfg, self.log)
        self._server_lines = ""
        self._last_response: tuple[str, str, int, Headers] = ("", "", 0, [])
        self._last_head = b""
        self._last_has_id = False
        self._cors = list(cors_headers(settings).items())
        # Of the application, if its console has an origin of its own.
        self._find_origin_headers: Callable[[Environ], dict[str, str]] | None = getattr(
            self.wsgi, "find_origin_headers", None
        )
        self._id_prefix = os.urandom(6).hex()
        self._id_numbers = itertools.count(1)
        if settings.access_log != "none":
            self._access_log = AccessLog(settings.access_log, settings.access_log_file)
        name_traces_in_log()
        if self.tracing is not None:
            find_route: Callable[[str], str] = getattr(self.wsgi, "find_route", lambda path: "")
            self._recorder = Recorder(self.tracing.channel, self.tracing.sample, self.row.index, find_route)
        self._listeners = {sock.fileno(): (sock, self._make_template(sock)) for sock in self.sockets}
        self._accepting = False
        self._accept_again = 0.0
        self._balance = Balance(self.row, cfg.worker_connections)
        # Other workers cannot accept from a socket that is this worker's alone.
        self._is_alone = self.is_control or cfg.reuse_port
        self._poll_again = 0.0
        self._end = float("inf")
        self._epoll = select.epoll()
        self._epoll.register(self.PIPE[0], select.EPOLLIN)
        signal.signal(WAKE, lambda number, frame: None)  # gunicorn's pipe wakes the loop at every signal
        self.row.set_pid(os.getpid())
        for sock in self.sockets:
            sock.setblocking(False)
        self._start_accepting()
        self._set_busy(False)

    def _make_template(self, listener: socket.socket) -> Environ:
        """Return the common part of the environs of all requests from a listener."""
        address = listener.getsockname()
        host, port = address[:2] if isinstance(address, tuple) else ("localhost", "")
        return {
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https" if self._tls else "http",
            "wsgi.errors": WSGIErrorsWrapper(self.cfg),
            "wsgi.multithread": False,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,
            # A response may consist of any buffers, not of bytes only; they are sent or copied before the next call.
            "ovms_rest.buffers": True,
            "ovms_rest.path_is_read": True,  # PATH_INFO is what routing.read_path returns
            "ovms_rest.room": self.find_room,
            "SERVER_SOFTWARE": "ovms_rest",
            "SERVER_NAME": host,
            "SERVER_PORT": str(port),
            "SCRIPT_NAME": self._script_name,
            "REMOTE_ADDR": "",
        }

    # --- The loop

    def _turn(self) -> bool:
        """Run a turn of the loop; return whether there is to be another."""
        context, queue = self._context, self._queue
        is_due = queue.count or context.resuming or self._backlog or self._parked
        events = self._epoll.poll(0 if is_due else self._until_next_event())
        context.now = self._polled = time.monotonic()
        if len(events) == 1 and events[0][0] in self._connections and not self._backlog:  # as it mostly is
            connection = self._connections[events[0][0]]
            try:
                event = connection.handle(events[0][1])
                if event is not None:
                    self._dispatch(event)
            except Exception:
                self._drop(connection)
        else:
            self._handle(events)
        if context.resuming:
            self._resume()
        if queue.count or self._parked:
            began = context.now = time.monotonic()
            handled = began - self._polled
            until = began + (handled if handled > INFERRING_SECONDS else INFERRING_SECONDS)
            while (queue.count or self._parked) and context.now < until:
                if self._parked and (not queue.count or parking.is_full() or parking.is_first(queue.next_priority())):
                    self._infer_parked()
                    continue
                if queue.count > 1 or queue.next_deadline < NEVER:
                    self._refuse_late()
                if queue.count:
                    request = queue.pop()
                    connection = request.connection
                    if (self._backlog or connection.is_half_closed) and self._is_cancelled(request):
                        continue
                    try:
                        self._last_inferred = (connection,)
                        if self._find_batched is None:
                            self._run(request)
                        else:
                            self._run_with_others(request, self._find_batched)
                    except Exception:
                        self._drop(connection)
                    self._inferred_until = context.now
            took = context.now - began
            self._handling_seconds = (
                HANDLING_SECONDS if took < HANDLING_SECONDS else min(took, LONGEST_HANDLING_SECONDS)
            )
        if self._is_busy and not queue.count and not self._parked and not self._draining:
            self._set_busy(False)  # the last queued request was refused, or its client is gone
        if self._deferred and context.now >= self._poll_again:
            self._run_deferred()
        if not self._accepting and context.now >= self._accept_again:
            self._start_accepting()
            self._accept_left()
        if context.now >= self._next_tick:
            self._tick()
        if not self.alive and not self._draining:
            self._drain()
        if self._draining and not any(item.state in RECEIVING for item in self._connections.values()):
            self.row.set_closed()
        if self._draining and context.now >= self._end:
            self._refuse_rest()
            return False
        return not self._draining or bool(self._connections)

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Handle events while there is time, after those of the backlog.

        Connections are accepted last: a new one may get the descriptor of one that was closed for it.
        """
        until = self._context.now + self._handling_seconds
        others = self._put_off(events) if self._backlog else []
        if self._backlog:
            self._handle_backlog(until)
        else:
            for count, (fileno, mask) in enumerate(events, 1):
                connection = self._connections.get(fileno)
                if connection is None:
                    others.append(fileno)
                    continue
                self._guard(connection, connection.handle, mask)
                if time.monotonic() > until:
                    others += self._put_off(events[count:])
                    break
        for fileno in others:
            if fileno in self._listeners:
                self._accept(fileno)
            elif fileno == self.PIPE[0]:
                self._read_signals()

    def _put_off(self, events: list[tuple[int, int]]) -> list[int]:
        """Add events to the backlog; return the descriptors that are not of connections."""
        others = []
        for fileno, mask in events:
            connection = self._connections.get(fileno)
            if connection is None:
                others.append(fileno)
            else:
                self._backlog[connection] = self._backlog.get(connection, 0) | mask
        return others

    def _handle_backlog(self, until: float) -> None:
        """Handle events of the backlog, at least one."""
        left = iter(self._backlog.items())
        self._backlog = {}
        for connection, mask in left:
            self._guard(connection, connection.handle, mask)
            self._expire(connection)
            if time.monotonic() > until:
                break
        self._backlog.update(left)

    def _resume(self) -> None:
        """Let connections continue while there is time, at least one and each once."""
        resuming = self._context.resuming
        until = time.monotonic() + self._handling_seconds * SLOW_PART
        for _ in range(len(resuming)):
            connection = resuming.popleft()
            connection.is_resuming = False
            self._guard(connection, connection.resume)
            self._expire(connection)
            if time.monotonic() > until:
                break

    def _expire(self, connection: Connection) -> None:
        """End a connection whose deadline has passed although it had its turn."""
        if connection.deadline < self._polled:
            self._guard(connection, connection.expire)

    def _run_deferred(self) -> None:
        """Run the deferred requests again whose responses are ready, while there is time."""
        deferred, self._deferred = self._deferred, []
        until = time.monotonic() + self._handling_seconds
        for index, (request, is_due) in enumerate(deferred, 1):
            self._context.now = time.monotonic()
            self._guard(request.connection, self._run_again, request, is_due)
            if self._context.now > until:
                self._deferred = deferred[index:] + self._deferred
                return
        self._poll_again = self._context.now + POLL_SECONDS

    def _set_busy(self, busy: bool) -> None:
        """Publish whether this worker has inferences to run; others leave connections to one that has none."""
        self._is_busy = busy
        self.row.set_idle(0 if busy or self._draining or self.is_control else time.monotonic_ns())

    def _guard(self, connection: Connection, step: Callable[..., Event | None], *arguments: Any) -> None:
        """Take a step with a connection; an exception costs that connection and no other.

        The steps of every inference are guarded where they are taken, without another call.
        """
        try:
            event = step(*arguments)
            if event is not None:
                self._dispatch(event)
        except Exception:
            self._drop(connection)

    @staticmethod
    def _drop(connection: Connection) -> None:
        """Close a connection after an exception, which is logged."""
        request = connection.request
        environ = {} if request is None else request.environ
        request_id = environ.get("HTTP_X_REQUEST_ID", "-")
        with within(environ.get(TRACE)):
            log.exception("error on a connection, which is closed, with request %r", request_id)
        connection.close()

    def _until_next_event(self) -> float:
        until = min(self._next_tick, self._poll_again) if self._deferred else self._next_tick
        if not self._accepting:
            until = min(until, self._accept_again)
        return max(0.0, until - self._context.now)

    def _read_signals(self) -> None:
        """Empty the pipe of signals, whose handlers have run; WAKE means that another worker left a connection."""
        if WAKE in os.read(self.PIPE[0], 4096):
            for listener in self._listeners:
                self._accept(listener, insists=1)
        if self._must_reopen_logs:
            self._reopen_logs()

    def _tick(self) -> None:
        """Do the chores of every second."""
        self.notify()
        self._next_tick = self._context.now + TICK_SECONDS
        self._server_lines = encode_server_lines(time.time())
        # Bytes that arrived during an inference are read before a deadline counts; so are connections in the backlog.
        for connection in [item for item in self._connections.values() if item.deadline < self._polled]:
            if not connection.is_resuming and connection not in self._backlog:
                self._guard(connection, connection.expire)
        self._balance.restore_limit()
        # The system wakes one worker for a connection; if that one is stopped, nobody would accept it.
        for listener in self._listeners if self._accepting else ():
            self._accept(listener)
        if self._context.now >= self._next_watch:
            self._next_watch = self._context.now + (self.poll_seconds or math.inf)
            if self.watch is not None and not self._draining and (self.is_control or self.row.is_first()):
                self.watch()
        if self.ppid != os.getppid():
            if not self._draining:
                log.info("the arbiter of worker %s is gone; the worker ends", self.pid)
            self.alive = False
            postpone(self.cfg.graceful_timeout + 2 * TICK_SECONDS)

    def _drain(self) -> None:
        """Begin to drain: no new connections, and the last requests on the existing ones.

        The arbiter waits for its workers when it ends itself, but not when one ends for another reason.
        """
        for listener in self._listeners:  # closing them would reset connections that nobody has accepted
            self._accept(listener, insists=1)
        self._draining = True
        self._set_busy(True)
        self.row.set_connections(0)  # so that none is left to it
        grace = self.cfg.graceful_timeout
        self._end = self._context.now + max(grace - REFUSING_SECONDS, grace / 2)
        self._stop_accepting()
        self._accept_again = float("inf")
        for sock in self.sockets:
            sock.close()
        self._listeners = {}
        self.row.set_ready(False)
        for connection in list(self._connections.values()):
            connection.drain(self._context.now + DRAIN_SECONDS)

    # --- Connections

    def _start_accepting(self) -> None:
        if self._draining:
            return
        self._accepting = True
        for fileno in self._listeners:
            self._epoll.register(fileno, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def _stop_accepting(self, pause: float = 0.0) -> None:
        self._accept_again = self._context.now + pause
        if self._accepting:
            self._accepting = False
            for fileno in self._listeners:
                self._epoll.unregister(fileno)

    def _accept_left(self) -> None:
        """Accept some of the connections that are still there after a pause in which no other worker came for them."""
        insists = self._balance.count_after_waiting(len(self._connections))
        for listener in self._listeners if self._accepting else ():
            self._accept(listener, insists)

    def _accept(self, fileno: int, insists: int = 0) -> None:
        """Accept some of the connections that are there, or leave them to other workers.

        A worker without connections claims one before it looks at the others: so of many that wake for a burst of
        connections, only as many accept one as there are cores.
        """
        if self._connections or self._is_alone:
            self._take(fileno, insists)
            return
        self.row.set_connections(CLAIMED)
        self._take(fileno, insists)
        self._publish_connections()

    def _take(self, fileno: int, insists: int) -> None:
        """Accept some connections, or leave them.

        The first `insists` are accepted without regard to the other workers, unless this one has no room and others
        have: another worker has asked for it, or none came for them. When no worker has room, a connection that waits
        for a request is closed for the new one.
        """
        listener, template = self._listeners[fileno]
        for count in range(ACCEPTS_PER_TURN):
            held = len(self._connections)
            is_full = self._balance.is_full(held)
            insisting = count < insists and not is_full
            leave = None if insisting or self._is_alone else self._balance.choose(held, count > 0)
            if (leave or is_full) and not _has_connection(listener):
                return
            if leave:
                if leave.pid is not None:
                    wake(leave.pid)
                self._stop_accepting(leave.seconds)
                return
            if is_full and not self._close_longest_idle():
                self._stop_accepting(ACCEPT_PAUSE_SECONDS)
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if not _has_connection(listener):  # the system reserves a descriptor before it looks for a connection
                    return
                log.error("cannot accept a connection: %s", error.strerror)
                if error.errno != errno.EMFILE:
                    self._stop_accepting(ACCEPT_PAUSE_SECONDS)
                    return
                self._balance.lower_limit(held)
                continue
            try:
                self._add(sock, address, template)
            except OSError:  # reset before it was accepted
                sock.close()

    def _close_longest_idle(self) -> bool:
        """Close the connection that has been idle longest; return whether there was one."""
        for _ in range(2):
            while self._idle:
                since, connection = self._idle.pop()
                if connection.idle_since == since and connection.is_idle():
                    connection.close()
                    return True
            waiting = [item for item in self._connections.values() if item.state is State.HEAD]
            self._idle = sorted(((item.idle_since, item) for item in waiting), key=_first, reverse=True)
        return False

    def _add(self, sock: socket.socket, address: Any, template: Environ) -> None:
        sock.setblocking(False)
        if isinstance(address, tuple):
            template = {**template, "REMOTE_ADDR": address[0], "REMOTE_PORT": str(address[1])}
        kind = Connection
        if self._tls is not None:
            sock = self._tls.wrap_socket(
                sock,
                server_side=True,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=self.cfg.suppress_ragged_eofs,
            )
            kind = TlsConnection
        connection = kind(self._context, sock, template)
        self._connections[sock.fileno()] = connection
        self._epoll.register(sock.fileno(), EVENTS)
        self._publish_connections()

    def _publish_connections(self) -> None:
        if not self.is_control and not self._draining:  # others leave none to these
            self.row.set_connections(len(self._connections))

    def _forget(self, connection: Connection) -> None:
        """Drop a connection that is being closed."""
        del self._connections[connection.socket.fileno()]
        if self._backlog:
            self._backlog.pop(connection, None)
        self._publish_connections()
        request = connection.request
        if request is not None:
            self._queue.remove(request)
            if self._deferred:
                self._deferred = [deferred for deferred in self._deferred if deferred.request is not request]

    def find_room(self) -> Room:
        """Return how much memory unfinished requests and responses hold, for the application."""
        return Room(self._context.held, self._context.max_held)

    # --- Requests

    def _dispatch(self, event: Event) -> None:
        """Handle the event that a connection has returned."""
        if isinstance(event, Request):
            self._submit(event)
        elif isinstance(event, Refused):
            log.debug("refused a request with %s: %s", event.refusal.status, event.refusal)
            self._send_refusal(*event)
        else:
            self._cancel(*event)

    def _submit(self, request: Request) -> None:
        """Run a request, or queue it when it infers."""
        self._identify(request.environ)
        request.received_ns = time.monotonic_ns()
        connection, count = request.connection, self._queue.count
        trace = None
        if self._recorder is not None or "HTTP_TRACEPARENT" in request.environ:
            trace = self._begin_trace(request)
        if request.head.inference is None:
            self._context.now = request.received_ns / 1e9
            self._run(request)
        elif self.is_control:
            self._send_refusal(request, Refusal(404, "inferences are not served on the control address"))
        elif connection.is_half_closed and self._has_waited(connection):
            self._refuse_cancelled(request, 0)
        elif count >= self._max_queued:
            self._count_refusal(request, "overload", 0)
            message = f"overloaded: {count} requests are already queued, the limit per worker"
            self._send_refusal(request, Refusal(503, message, _RETRY))
        else:
            request.environ["ovms_rest.inference"] = record = InferenceRecord(request.received_ns)
            if trace is not None and trace.parent_id is not None:
                record.nodes = []
            self._queue.push(request)
            if count:
                connection.hold_request(request)
            if not self._is_busy:
                self._set_busy(True)

    def _begin_trace(self, request: Request) -> TraceContext | None:
        """Note the place of a request in a trace; return it, None if there is none."""
        environ = request.environ
        if self._recorder is not None:
            self._recorder.begin(environ, request.head.inference is not None)
        elif (context := read_context_of(environ)) is not None:
            environ[TRACE] = context
        return environ.get(TRACE)

    def _count_refusal(self, request: Request, kind: FailureKind, waited_ns: int) -> None:
        """Count an inference that the application does not see."""
        if request.head.inference is not None:
            self.wsgi.count_refusal(*request.head.inference, kind, waited_ns, request.environ["PATH_INFO"])

    def _refuse_late(self) -> None:
        """Refuse the queued requests whose timeout has passed."""
        for request, terms in self._queue.expire(time.monotonic_ns()):
            self._guard(request.connection, self._send_late, request, terms)

    def _send_late(self, request: Request, terms: Terms) -> None:
        waited = time.monotonic_ns() - terms.since_ns
        self._count_refusal(request, "timeout", waited)
        message = str(DeadlineError(terms.timeout_us, waited))
        self._send_refusal(request, Refusal(503, message, _RETRY))

    def _cancel(self, request: Request, is_gone: bool) -> None:
        """Give up an inference whose client closed the connection while it was queued.

        A client that has only closed its sending side gets a response, as it may still read. Requests that do not infer
        are deferred until a change is made, which is not given up, and get their response.
        """
        if request.head.inference is None or request.is_running:
            return
        self._queue.remove(request)
        waited = time.monotonic_ns() - request.received_ns
        if is_gone:
            self._count_refusal(request, "canceled", waited)
            if self._recorder is not None:
                self._recorder.end(request.environ, "", 0, (), request.received_ns)
        else:
            self._refuse_cancelled(request, waited)

    def _refuse_cancelled(self, request: Request, waited: int) -> None:
        self._count_refusal(request, "canceled", waited)
        request.connection.linger()
        message = "the client closed its side of the connection before the inference began, which cancels the request"
        self._send_refusal(request, Refusal(503, message, _RETRY))

    def _has_waited(self, connection: Connection) -> bool:
        """Return whether a request that has just been read has to wait, or did so in the system's buffer.

        Clients that close their sending side after their last request, and read, get responses of an idle worker.
        """
        if self._queue.count or connection.is_gone:
            return True
        return connection not in self._last_inferred and connection.received_by() < self._inferred_until

    def _is_cancelled(self, request: Request) -> bool:
        """Return whether a request whose turn has come is cancelled, also by an event in the backlog."""
        connection = request.connection
        if mask := self._backlog.pop(connection, 0):
            self._guard(connection, connection.handle, mask)
        if connection.state is not State.COMPLETE:
            return True
        if (
            connection.is_half_closed
            and connection not in self._last_inferred
            and request.received_ns < self._inferred_until * 1e9
        ):
            self._guard(connection, self._cancel, request, False)
            return True
        return False

    def _refuse_rest(self) -> None:
        """Refuse the requests that are queued or deferred when the time to shut down is over."""
        deferred, self._deferred = self._deferred, []
        for request, _ in deferred:
            is_call = request.head.inference is None
            outcome = "the outcome of the call will be in its log" if is_call else "the request was not started"
            self._refuse_at_end(request, outcome)
        while self._parked:
            self._infer_parked()
        while self._queue.count:
            self._refuse_at_end(self._queue.pop(), "the request was not started")

    def _refuse_at_end(self, request: Request, outcome: str) -> None:
        request.connection.linger()
        refusal = Refusal(503, f"the server is shutting down; {outcome}", _RETRY)
        self._guard(request.connection, self._send_refusal, request, refusal)

    def _send_refusal(self, request: Request, refusal: Refusal) -> None:
        status, headers, body = encode_refusal(refusal)
        environ = request.environ
        headers += ((self._find_origin_headers and self._find_origin_headers(environ)) or {}).items() or self._cors
        self._identify(environ)
        received_ns = request.received_ns or time.monotonic_ns()  # 0 of a request that was not received whole
        if self._recorder is not None and TRACE not in environ:
            self._begin_trace(request)
        parts: list[Buffer] = [] if refusal.is_of_head else [body]
        size = self._send(request, status, headers, parts, sum(map(len, parts)))
        if self._observed:
            self.log.access(_ObservedResponse(status, headers, size), _Observed(environ), environ, timedelta())
        if self._access_log is not None:
            self._access_log.write(access_of(environ, status, size, received_ns))
        if self._recorder is not None:
            self._recorder.end(environ, status, size, parts, received_ns)

    def _identify(self, environ: Environ) -> None:
        """Give a request an id, unless it has one from its client that fits into a line of a log."""
        given = environ.get("HTTP_X_REQUEST_ID")
        if given is None or not is_request_id(given):
            environ["HTTP_X_REQUEST_ID"] = f"{self._id_prefix}-{next(self._id_numbers)}"

    def _run(self, request: Request, is_again: bool = False) -> None:
        """Run the application for a request and send the response, or defer it; `Context.now` has to be up to date."""
        context = self._context
        started = self._started = context.now
        try:
            call = self._call_within_trace if TRACE in request.environ else self._call
            status, headers, parts, size = call(request.environ, is_again)
        except TryLaterError as error:
            request.is_running = True  # a client that only closes its sending side gets the response all the same
            self._deferred.append(Deferred(request, error.is_due))
            return
        if request.is_running and request.connection.state is not State.COMPLETE:
            if self._recorder is not None:
                self._recorder.end(request.environ, "", 0, (), request.received_ns)
            return  # the client has disconnected while the request was parked
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            log.info("worker %s reached max_requests after %s requests and ends", self.pid, self.nr)
            self.alive = False
        context.now = time.monotonic()  # an inference may have taken long
        if self._is_busy and not self._queue.count and not self._parked:
            # Before the client gets its response, and may send its next request to another worker.
            self._set_busy(False)
        size = self._send(request, status, headers, parts, size)
        if self._observed:
            began = request.received_ns / 1e9 if is_again else started
            self._observe(request.environ, status, headers, size, time.monotonic() - began)
        if self._access_log is not None:
            self._access_log.write(access_of(request.environ, status, size, request.received_ns))
        if self._recorder is not None:
            self._recorder.end(request.environ, status, size, parts, request.received_ns)

    def _run_with_others(self, request: Request, find_batched: FindBatched) -> None:
        """Run a request, together with queued ones for the same model if that infers batches."""
        others = self._find_others(request, find_batched) if self._queue.count else []
        if not others:
            self._run(request)
            return
        self._last_inferred = [each.connection for each in (request, *others)]
        request.connection.hold_request(request)  # as those that were queued after it
        taken = []
        for each in (request, *others):
            if parking.is_full():
                break
            taken.append(each)
            connection = each.connection
            if (self._backlog or connection.is_half_closed) and self._is_cancelled(each):
                continue
            each.is_running = True
            self._context.now = time.monotonic()
            parking.run(self._run_parked, each)
        self._queue.remove(*taken)
        if self._parked:
            self._infer_parked()

    def _find_others(self, request: Request, find_batched: FindBatched) -> list[Request]:
        """Return queued requests for the same model, with or without the version in their path."""
        key = request.head.inference
        if key is None or (model := find_batched(*key)) is None:
            return []

        def is_for_model(other: Request) -> bool:
            found = other.head.inference
            return found == key or (found is not None and found[0] == key[0] and find_batched(*found) is model)

        return self._queue.find(is_for_model, model.batch_limit - 1)

    def _run_parked(self, request: Request) -> None:
        """Run a request in a greenlet of its own."""
        try:
            self._run(request)
        except Exception:
            self._drop(request.connection)

    def _infer_parked(self) -> None:
        """Infer the next batch, which ends its requests unless they need another one."""
        self._started, self._inferring = time.monotonic(), len(self._parked)
        parking.infer_next()
        self._inferring = 0
        self._context.now = self._inferred_until = time.monotonic()

    def _run_again(self, request: Request, is_due: Callable[[], bool]) -> None:
        """Run a deferred request again if its response is ready; the user's pre_request hook has seen it already."""
        if is_due():
            self._run(request, is_again=True)
        else:
            self._deferred.append(Deferred(request, is_due))

    def _call_within_trace(self, environ: Environ, is_again: bool) -> tuple[str, Headers, list[Buffer], int]:
        """Call the application so that its log lines, and calls of custom nodes, know the trace."""
        with within(environ[TRACE]):
            return self._call(environ, is_again)

    def _call(self, environ: Environ, is_again: bool) -> tuple[str, Headers, list[Buffer], int]:
        """Call the application; return status, headers, the parts of the body and their size."""
        response: list[Any] = []

        def start_response(status: str, headers: Headers, exc_info: Any = None) -> Any:
            response[:] = status, headers, []
            return response[2].append

        try:
            if self._observed and not is_again:
                self.cfg.pre_request(self, _Observed(environ))
            result: Iterable[Buffer] = self.wsgi(environ, start_response)
            try:
                parts = list(result)
            finally:
                if hasattr(result, "close"):
                    result.close()
            status, headers, written = response
        except TryLaterError:
            raise
        except Exception:
            request_id, method, target = (environ[key] for key in ("HTTP_X_REQUEST_ID", "REQUEST_METHOD", "RAW_URI"))
            log.exception("error while running request %s, %s %s", request_id, method, target)
            body = encode_error("internal error; the reason is in the server's log")
            return "500 Internal Server Error", [("Content-Type", "application/json"), *self._cors], [body], len(body)
        if written:
            parts = written + parts
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        if size > SMALL_RESPONSE and self._context.held + size > self._context.max_held:
            refusal = Refusal(503, describe_lack("a response", size, self.find_room()), _RETRY)
            status, headers, body = encode_refusal(refusal)
            return status, headers + self._cors, [body], len(body)
        return status, headers, parts, size

    def _send(self, request: Request, status: str, headers: Headers, parts: list[Buffer], size: int) -> int:
        """Send a response whose body has `size` bytes; return how many of them are sent, 0 for HEAD."""
        connection, environ = request.connection, request.environ
        if connection.keep_alive and self._has_to_close(connection):
            connection.linger()
        lines = self._server_lines
        if not connection.keep_alive:
            lines += "Connection: close\r\n"
        elif environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            lines += "Connection: keep-alive\r\n"
        response = (status, lines, size, headers)
        if response != self._last_response:  # mostly it is the same
            has_none = status.startswith(("204", "304")) or _has_field(headers, "content-length")  # RFC 9110, 8.6
            length = [] if has_none else [("Content-Length", str(size))]
            try:
                self._last_head = encode_head(status, headers + length, lines)
            except ValueError:
                with within(environ.get(TRACE)):
                    log.exception("the response to request %s cannot be sent", environ["HTTP_X_REQUEST_ID"])
                connection.close()
                return 0
            self._last_response = (status, lines, size, headers.copy())  # the list may be changed and passed again
            self._last_has_id = _has_field(headers, "x-request-id")
        end = "\r\n" if self._last_has_id else f"X-Request-ID: {environ['HTTP_X_REQUEST_ID']}\r\n\r\n"
        head = self._last_head + end.encode()
        if environ["REQUEST_METHOD"] == "HEAD":
            parts, size = [], 0
        total = len(head) + size
        if total <= SMALL_RESPONSE:
            connection.send([b"".join([head, *parts])], total)
        else:
            connection.send([head, *parts], total)
        return size

    def _has_to_close(self, connection: Connection) -> bool:
        """Return whether to close a connection after its response, unless more requests were received on it."""
        if not self._keeps_alive:
            return True
        if self.alive:
            if self.is_control:  # no other worker serves its address
                return False
            now = self._context.now
            if now < self._balance_again:
                return False
            self._balance_again = now + BALANCE_SECONDS
            queued = self._queue.count + self._inferring
            if not self._balance.is_another_better_off(queued, len(self._connections), now - self._started):
                return False
        return not connection.has_more()

    def _observe(self, environ: Environ, status: str, headers: Headers, size: int, seconds: float) -> None:
        """Report a request to gunicorn's hooks and access log."""
        request, response = _Observed(environ), _ObservedResponse(status, headers, size)
        self.log.access(response, request, environ, timedelta(seconds=seconds))
        try:
            self.cfg.post_request(self, request, environ, response)
        except Exception:
            log.exception("exception in the post_request hook")

    def handle_usr1(self, sig: int, frame: Any) -> None:
        """Schedule reopening the logs: a signal handler may have interrupted a write to one of them."""
        self._must_reopen_logs = True

    def _reopen_logs(self) -> None:
        self._must_reopen_logs = False
        try:
            self.log.reopen_files()
        except OSError as error:  # with `capture_output`, a file that only the arbiter may open
            log.error("cannot reopen the log: %s", error)
        if self._access_log is not None:
            self._access_log.reopen()

    @staticmethod
    def check_config(cfg: Any, logger: Any) -> None:
        """End the process for settings that this worker does not support, before anything is started."""
        for name, allowed in (("proxy_protocol", "off"), ("http_protocols", ["h1"])):
            if getattr(cfg, name) != allowed:
                logger.error("gunicorn's setting %s is not supported, it must be %r", name, allowed)
                sys.exit(1)


def _keep_freed_memory() -> None:
    """Make the C library reuse memory of the size of bodies instead of asking for new pages.

    New pages cost more than everything else about a tensor of a few hundred kilobytes (see tests/benchmarks/README.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def _first(pair: tuple[float, Connection]) -> float:
    return pair[0]


def _read_terms(request: Request) -> Terms:
    return read_terms(request.environ, request.received_ns)


def _has_connection(listener: socket.socket) -> bool:
    """Return whether there is a connection to accept."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def _has_field(headers: Headers, name: str) -> bool:
    return name in [field.lower() for field, _ in headers]


def _is_observed(cfg: Any, logger: Any) -> bool:
    """Return whether single requests are observed, by gunicorn's access log or a user's hooks."""
    hooks = (cfg.pre_request, PreRequest.default), (cfg.post_request, PostRequest.default)
    return logger.access_log_enabled or any(hook is not default for hook, default in hooks)


class _Observed:
    """A request in the form of gunicorn's hooks and access log."""

    def __init__(self, environ: Environ) -> None:
        self.method: str = environ["REQUEST_METHOD"]
        self.uri: str = environ["RAW_URI"]
        self.path: str = environ["PATH_INFO"]
        self.query: str = environ["QUERY_STRING"]
        self.version = (1, int(environ["SERVER_PROTOCOL"][-1]))
        self.remote_addr = (environ["REMOTE_ADDR"], environ.get("REMOTE_PORT", ""))
        self.headers = [
            (key.removeprefix("HTTP_").replace("_", "-"), value)
            for key, value in environ.items()
            if key.startswith(("HTTP_", "CONTENT_"))
        ]


class _ObservedResponse:
    """A response in the form of gunicorn's hooks and access log."""

    def __init__(self, status: str, headers: Headers, size: int) -> None:
        self.status = status
        self.status_code = int(status.split()[0])
        self.headers = headers
        self.sent = self.response_length = size
        self.headers_sent = True
