"""The gunicorn worker of the service: one thread, epoll, and the WSGI application called directly.

A turn of its loop handles what epoll reports, answers what does not infer at once, and makes an inference of those
that wait, or a few that are short. It looks at its sockets in between, so that probes wait for one at the most.

Whatever clients send, a turn takes a few milliseconds besides its inferences, or as long as those. Connections that are
left over come first in the next turn, in their order. A connection that takes a lot of time, with an upload or a body
of tiny chunks, goes on a little in every turn, beside the others and not in front of them.
"""

import ctypes
import itertools
import logging
import math
import os
import select
import signal
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from gunicorn.config import PostRequest, PreRequest
from gunicorn.http.wsgi import FileWrapper, WSGIErrorsWrapper
from gunicorn.workers.base import Worker as BaseWorker

from ovms_rest.errors import DeadlineError, TryLaterError
from ovms_rest.protocol.encoding import encode_error
from ovms_rest.protocol.room import Room, describe_lack
from ovms_rest.protocol.routes import read_script_name
from ovms_rest.settings import cors_headers, read_settings
from ovms_rest.shared_memory.failure_note import BOOT_ERROR, FailureNote
from ovms_rest.shared_memory.table import WAKE, Row, wake
from ovms_rest.worker.access_log import AccessLog, access_of
from ovms_rest.worker.connection import EVENTS, RECEIVING, Buffer, Connection, State, Times, TlsConnection
from ovms_rest.worker.http1 import (
    Environ,
    HeadReader,
    Refusal,
    encode_head,
    encode_refusal,
    encode_server_lines,
    is_request_id,
)
from ovms_rest.worker.queue import NEVER, Terms, WaitingQueue, read_terms

log = logging.getLogger("gunicorn.error.ovms_rest")

# A receive of this size takes a head with a small body in one call.
ARENA_BYTES = 64 * 1024
# Up to here one buffer is cheaper to send than several, the copy included.
SMALL_ANSWER = 4096
# A connection that was left to another worker is taken after all when that one has not come for it.
HANDOVER_SECONDS = 0.005
# The same of a worker that has no connection because there are more workers than cores.
SPARE_HANDOVER_SECONDS = 0.05
# A worker that has had nothing to do for so long gets clients of one that has requests in waiting.
IDLE_NANOSECONDS = 5_000_000
TICK_SECONDS = 1.0
# An answer that is not there yet is asked for again so much later.
ASK_SECONDS = 0.05
# Inferences that are shorter are made one after another for so long before the sockets are looked at.
INFERRING_SECONDS = 0.0005
# All else gets so long in a turn, or as long as the inferences of the last turn took, up to the second figure.
HANDLING_SECONDS = 0.004
LONGEST_HANDLING_SECONDS = 0.05
# Connections that are slow get this part of that time, besides.
SLOW_PART = 0.25
# So many connections are accepted in a turn.
ACCEPTS_PER_TURN = 32
# While it ends, a worker waits so long for a last request on a connection that is kept alive.
DRAIN_SECONDS = 1.0
# While it ends, a worker refuses what still waits so long before the arbiter would kill it.
REFUSING_SECONDS = 1.0
# A process that has no file descriptor left tries again so much later.
ACCEPT_PAUSE_SECONDS = 0.1

# How much freed memory a worker keeps; half of it in one piece.
KEPT_BYTES = 64 * 2**20
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

Headers = list[tuple[str, str]]

_RETRY = {"Retry-After": "1"}


class Worker(BaseWorker):  # type: ignore[misc]
    """Serves the sockets of the arbiter, or, as the control worker, the control address alone."""

    # Set by the arbiter's hooks before the fork.
    row: Row
    is_control: bool = False
    tls: ssl.SSLContext | None = None
    failure: FailureNote

    _access_log: AccessLog | None = None
    _must_reopen_logs = False

    def init_process(self) -> None:
        """Become ready and serve: what gunicorn calls in the forked process, in which it returns at the end."""
        try:
            super().init_process()
        except Exception as error:
            if self.row.was_ready():
                raise  # gunicorn logs it
            self.failure.write(error)
            sys.exit(BOOT_ERROR)

    def run(self) -> None:
        """Serve until told to end: gunicorn's main loop of a worker."""
        self._set_up()
        self.row.set_ready()
        while self._turn():
            pass

    def _set_up(self) -> None:
        cfg, settings = self.cfg, read_settings(os.environ)
        # The application's check of its files for changes, and how often to call it, 0 for never.
        self.watch: Callable[[], None] | None = getattr(self.wsgi, "watch", None)
        self.poll_seconds = settings.file_system_poll_wait_seconds
        self._script_name = read_script_name(os.environ.get("SCRIPT_NAME", ""))
        self.heads = HeadReader(cfg, self._script_name)
        self.times = Times(
            settings.head_timeout_seconds,
            settings.body_timeout_seconds,
            settings.send_timeout_seconds,
            cfg.keepalive,
        )
        self.max_body = settings.max_body_bytes
        self.max_held = settings.max_held_bytes
        self.max_waiting = settings.max_waiting
        _keep_freed_memory()
        self.arena = memoryview(bytearray(ARENA_BYTES))
        self.held = 0
        self.now = self._polled = time.monotonic()
        self._tls = self.tls
        self._waiting: WaitingQueue[Connection] = WaitingQueue(_read_terms)
        self._resuming: deque[Connection] = deque()
        self._backlog: dict[Connection, int] = {}  # with events that there was no time for
        self._idle: list[tuple[float, Connection]] = []  # some that were idle, the longest idle one last
        self._handling_seconds = HANDLING_SECONDS
        self._asking: list[Connection] = []  # whose answers are not there yet
        self._connections: dict[int, Connection] = {}
        self._draining = False
        self._is_busy = False
        self._started = self.now
        self._last_inferred: Connection | None = None
        self._inferred_until = -math.inf
        self._next_tick = self.now
        self._next_watch = self.now if self.poll_seconds else math.inf
        self._observed = _is_observed(cfg, self.log)
        self._server_lines = ""
        self._last_answer: tuple[str, str, int, Headers] = ("", "", 0, [])
        self._last_head = b""
        self._last_has_id = False
        self._cors = list(cors_headers(settings).items())
        self._id_prefix = os.urandom(6).hex()
        self._id_numbers = itertools.count(1)
        if settings.access_log != "none":
            self._access_log = AccessLog(settings.access_log, settings.access_log_file)
        self._listeners = {sock.fileno(): (sock, self._make_template(sock)) for sock in self.sockets}
        self._accepting = False
        self._accept_again = 0.0
        self._insisting = False
        self._ask_again = 0.0
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
        """Make the part of the environ that all requests from a listener have in common."""
        address = listener.getsockname()
        host, port = address[:2] if isinstance(address, tuple) else ("localhost", "")
        # Asks for what is known of an inference, which comes as `ovms_rest.served`.
        observed = {} if self._access_log is None else {"ovms_rest.observed": True}
        return {
            **observed,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https" if self._tls else "http",
            "wsgi.errors": WSGIErrorsWrapper(self.cfg),
            "wsgi.multithread": False,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,
            # What is answered may be of any buffers, not of bytes alone; they are sent or copied before the next call.
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
        """Make a turn of the loop; return whether there is to be another."""
        is_due = self._waiting.count or self._resuming or self._backlog
        events = self._epoll.poll(0 if is_due else self._until_next_event())
        self.now = self._polled = time.monotonic()
        if len(events) == 1 and events[0][0] in self._connections and not self._backlog:  # as it mostly is
            connection = self._connections[events[0][0]]
            try:
                connection.handle(events[0][1])
            except Exception:
                self._drop(connection)
        else:
            self._handle(events)
        if self._resuming:
            self._resume()
        waiting = self._waiting
        if waiting.count:
            began = self.now = time.monotonic()
            handled = began - self._polled
            until = began + (handled if handled > INFERRING_SECONDS else INFERRING_SECONDS)
            while waiting.count and self.now < until:
                if waiting.count > 1 or waiting.next_deadline < NEVER:
                    self._refuse_late()
                if waiting.count:
                    connection = waiting.pop()
                    if (self._backlog or connection.is_half_closed) and self._is_cancelled(connection):
                        continue
                    try:
                        self._answer(connection)
                    except Exception:
                        self._drop(connection)
                    self._last_inferred, self._inferred_until = connection, self.now
            took = self.now - began
            self._handling_seconds = (
                HANDLING_SECONDS if took < HANDLING_SECONDS else min(took, LONGEST_HANDLING_SECONDS)
            )
        if self._is_busy and not waiting.count and not self._draining:
            self._set_busy(False)  # the last that waited was refused, or is gone
        if self._asking and self.now >= self._ask_again:
            self._ask()
        if not self._accepting and self.now >= self._accept_again:
            self._start_accepting()
        if self.now >= self._next_tick:
            self._tick()
        if not self.alive and not self._draining:
            self._drain()
        if self._draining and not any(item.state in RECEIVING for item in self._connections.values()):
            self.row.set_closed()
        if self._draining and self.now >= self._end:
            self._refuse_rest()
            return False
        return not self._draining or bool(self._connections)

    def _handle(self, events: list[tuple[int, int]]) -> None:
        """Handle events as long as there is time, after those that there was no time for before.

        Connections are accepted last: a new one may have the number of one that is closed for it.
        """
        until = self.now + self._handling_seconds
        others = self._queue(events) if self._backlog else []
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
                    others += self._queue(events[count:])
                    break
        for fileno in others:
            if fileno in self._listeners:
                self._accept(fileno)
            elif fileno == self.PIPE[0]:
                self._read_signals()

    def _queue(self, events: list[tuple[int, int]]) -> list[int]:
        """Put events behind those that wait; return the files that are no connection's."""
        others = []
        for fileno, mask in events:
            connection = self._connections.get(fileno)
            if connection is None:
                others.append(fileno)
            else:
                self._backlog[connection] = self._backlog.get(connection, 0) | mask
        return others

    def _handle_backlog(self, until: float) -> None:
        """Handle events that waited, one at least."""
        left = iter(self._backlog.items())
        self._backlog = {}
        for connection, mask in left:
            self._guard(connection, connection.handle, mask)
            self._expire(connection)
            if time.monotonic() > until:
                break
        self._backlog.update(left)

    def _resume(self) -> None:
        """Let connections go on as long as there is time, one at least and each once."""
        until = time.monotonic() + self._handling_seconds * SLOW_PART
        for _ in range(len(self._resuming)):
            connection = self._resuming.popleft()
            connection.is_resuming = False
            self._guard(connection, connection.resume)
            self._expire(connection)
            if time.monotonic() > until:
                break

    def _expire(self, connection: Connection) -> None:
        """End a connection that had its turn, if it is too late for it nevertheless."""
        if connection.deadline < self._polled:
            self._guard(connection, connection.expire)

    def _ask(self) -> None:
        """Ask for answers that were not there yet, as long as there is time."""
        asking, self._asking = self._asking, []
        until = time.monotonic() + self._handling_seconds
        for index, connection in enumerate(asking, 1):
            self.now = time.monotonic()
            self._guard(connection, self._answer, connection)
            if self.now > until:
                self._asking = asking[index:] + self._asking
                return
        self._ask_again = self.now + ASK_SECONDS

    def _set_busy(self, busy: bool) -> None:
        """Tell the others, who leave connections to a worker without an inference to make."""
        self._is_busy = busy
        self.row.set_idle(0 if busy or self._draining or self.is_control else time.monotonic_ns())

    def _guard(self, connection: Connection, step: Callable[..., None], *arguments: Any) -> None:
        """Take a step with a connection; what is wrong with it costs that connection and no other.

        The steps of every inference are guarded where they are taken, without another call.
        """
        try:
            step(*arguments)
        except Exception:
            self._drop(connection)

    @staticmethod
    def _drop(connection: Connection) -> None:
        """Close a connection after an exception, which is logged."""
        request_id = "-" if connection.head is None else connection.head.environ.get("HTTP_X_REQUEST_ID", "-")
        log.exception("error on a connection, which is closed, with request %r", request_id)
        connection.close()

    def _until_next_event(self) -> float:
        until = min(self._next_tick, self._ask_again) if self._asking else self._next_tick
        if not self._accepting:
            until = min(until, self._accept_again)
        return max(0.0, until - self.now)

    def _read_signals(self) -> None:
        """Take note of signals, whose handlers have run. One tells that another worker left a connection to this."""
        if WAKE in os.read(self.PIPE[0], 4096):
            for listener in self._listeners:
                self._accept(listener, asked=True)
        if self._must_reopen_logs:
            self._reopen_logs()

    def _tick(self) -> None:
        """Do what is due once in a second."""
        self.notify()
        self._next_tick = self.now + TICK_SECONDS
        self._server_lines = encode_server_lines(time.time())
        # What came during an inference is read before anybody is late; those that wait for their turn have it first.
        for connection in [item for item in self._connections.values() if item.deadline < self._polled]:
            if not connection.is_resuming and connection not in self._backlog:
                self._guard(connection, connection.expire)
        # The system wakes one worker for a connection; one that is stopped would leave it lying there.
        for listener in self._listeners if self._accepting else ():
            self._accept(listener)
        if self.now >= self._next_watch:
            self._next_watch = self.now + (self.poll_seconds or math.inf)
            if self.watch is not None and not self._draining and (self.is_control or self.row.is_first()):
                self.watch()
        if self.ppid != os.getppid():
            log.info("the arbiter of worker %s is gone, so it ends", self.pid)
            self.alive = False

    def _drain(self) -> None:
        """Begin to end: no new connections, and the last requests on those that there are.

        The arbiter waits for its workers when it ends itself, but not when one ends for another reason.
        """
        self._draining = True
        self._set_busy(True)
        self.row.set_connections(0)  # none is to be left to it
        grace = self.cfg.graceful_timeout
        self._end = self.now + max(grace - REFUSING_SECONDS, grace / 2)
        self._stop_accepting()
        self._accept_again = float("inf")
        for sock in self.sockets:
            sock.close()
        self._listeners = {}
        self.row.set_ready(False)
        for connection in list(self._connections.values()):
            connection.drain(self.now + DRAIN_SECONDS)

    # --- Connections

    def _start_accepting(self) -> None:
        if self._draining:
            return
        self._accepting = True
        for fileno in self._listeners:
            self._epoll.register(fileno, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def _stop_accepting(self, pause: float = 0.0) -> None:
        self._accept_again = self.now + pause
        if self._accepting:
            self._accepting = False
            for fileno in self._listeners:
                self._epoll.unregister(fileno)

    def _accept(self, fileno: int, asked: bool = False) -> None:
        """Accept some of what is there, but leave it to an idle worker that has fewer connections.

        Who has just accepted one is about to be busy, and leaves the next to any that is idle. What was `asked` for, or
        left to another that has not come, is accepted at once. When no worker has room, a connection that waits for
        a request is closed for the new one.
        """
        listener, template = self._listeners[fileno]
        # Nobody else can take from a socket that is this worker's alone.
        alone = self.is_control or self.cfg.reuse_port
        insisting, self._insisting = asked or self._insisting or alone, False
        limit: float = len(self._connections)
        for _ in range(ACCEPTS_PER_TURN):
            freer = None if insisting else self.row.find_freer(limit)
            if freer is not None:
                if not _has_connection(listener):
                    return
                wake(freer)
                self._stop_accepting(HANDOVER_SECONDS if self._connections else SPARE_HANDOVER_SECONDS)
                self._insisting = True
                return
            if len(self._connections) >= self.cfg.worker_connections:
                if not _has_connection(listener):
                    return
                if not insisting and self.row.is_room_elsewhere(self.cfg.worker_connections):
                    self._stop_accepting(ACCEPT_PAUSE_SECONDS)
                    self._insisting = True
                    return
                if not self._close_longest_idle():
                    self._stop_accepting(ACCEPT_PAUSE_SECONDS)
                    return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept a connection: %s", error.strerror)
                self._stop_accepting(ACCEPT_PAUSE_SECONDS)
                return
            insisting, limit = alone, float("inf")
            try:
                self._add(sock, address, template)
            except OSError:  # reset before it was accepted
                sock.close()

    def _close_longest_idle(self) -> bool:
        """Close the connection that has waited longest for a request, if one does."""
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
        connection = kind(self, sock, template)
        self._connections[sock.fileno()] = connection
        self._epoll.register(sock.fileno(), EVENTS)
        self._tell_connections()

    def _tell_connections(self) -> None:
        if not self.is_control and not self._draining:  # to which none can be left
            self.row.set_connections(len(self._connections))

    def forget(self, connection: Connection) -> None:
        """Drop a connection that is being closed."""
        del self._connections[connection.socket.fileno()]
        if self._backlog:
            self._backlog.pop(connection, None)
        self._tell_connections()
        self._waiting.remove(connection)
        if connection in self._asking:
            self._asking.remove(connection)

    def resume_later(self, connection: Connection) -> None:
        """Let a connection go on in one of the next turns."""
        if not connection.is_resuming:
            connection.is_resuming = True
            self._resuming.append(connection)

    def find_room(self) -> Room:
        """Return how much memory unfinished requests and responses take, for the application."""
        return Room(self.held, self.max_held)

    # --- Requests

    def submit(self, connection: Connection) -> None:
        """Take a request that came whole: let it wait for its inference, or answer it."""
        assert connection.head is not None
        environ = connection.head.environ
        self._identify(environ)
        if not connection.head.is_inference:
            self.now = time.monotonic()
            self._answer(connection)
        elif self.is_control:
            self._send_refusal(connection, Refusal(404, "inferences are not served on the control address"))
        elif connection.is_half_closed and self._has_waited(connection):
            self._refuse_cancelled(connection, 0)
        elif self._waiting.count >= self.max_waiting:
            self.wsgi.count_refusal(environ["PATH_INFO"], "overload", 0)
            message = f"overloaded: {self._waiting.count} requests wait already, which is the limit of a worker"
            self._send_refusal(connection, Refusal(503, message, _RETRY))
        else:
            environ["ovms_rest.received"] = time.monotonic_ns()
            self._waiting.push(connection)
            if self._waiting.count > 1:
                connection.hold_request()
            if not self._is_busy:
                self._set_busy(True)

    def refuse(self, connection: Connection, refusal: Refusal) -> None:
        """Answer what is no request for the application."""
        log.debug("refused a request with %s: %s", refusal.status, refusal)
        self._send_refusal(connection, refusal)

    def _refuse_late(self) -> None:
        """Answer those who waited for longer than they want to."""
        for connection, terms in self._waiting.expire(time.monotonic_ns()):
            self._guard(connection, self._send_late, connection, terms)

    def _send_late(self, connection: Connection, terms: Terms) -> None:
        assert connection.head is not None
        waited = time.monotonic_ns() - terms.since_ns
        self.wsgi.count_refusal(connection.head.environ["PATH_INFO"], "timeout", waited)
        message = str(DeadlineError(terms.timeout_us, waited))
        self._send_refusal(connection, Refusal(503, message, _RETRY))

    def cancel(self, connection: Connection, is_gone: bool = False) -> None:
        """Give up a request whose client closed the connection while it waited for its inference.

        A client that has only closed its sending side gets an answer: what it is cannot be told from one that is gone.
        Requests that do not infer wait for a change that is made anyway, and are answered.
        """
        assert connection.head is not None
        environ = connection.head.environ
        if not connection.head.is_inference:
            return
        self._waiting.remove(connection)
        waited = time.monotonic_ns() - environ["ovms_rest.received"]
        if is_gone:
            self.wsgi.count_refusal(environ["PATH_INFO"], "canceled", waited)
        else:
            self._refuse_cancelled(connection, waited)

    def _refuse_cancelled(self, connection: Connection, waited: int) -> None:
        assert connection.head is not None
        self.wsgi.count_refusal(connection.head.environ["PATH_INFO"], "canceled", waited)
        connection.linger()
        message = "the client closed its side of the connection before the inference began, which cancels the request"
        self._send_refusal(connection, Refusal(503, message, _RETRY))

    def _has_waited(self, connection: Connection) -> bool:
        """Return whether a request that has just been read has to wait, or did so in the system's buffer.

        Clients that close their sending side behind their last request, and read, are answered by an idle worker.
        """
        if self._waiting.count or connection.is_gone:
            return True
        return connection is not self._last_inferred and connection.received_by() < self._inferred_until

    def _is_cancelled(self, connection: Connection) -> bool:
        """Return whether a request whose turn has come is cancelled: by an event that there was no time for, too."""
        if mask := self._backlog.pop(connection, 0):
            self._guard(connection, connection.handle, mask)
        if connection.state is not State.WAITING:
            return True
        assert connection.head is not None
        received = connection.head.environ["ovms_rest.received"]
        if (
            connection.is_half_closed
            and connection is not self._last_inferred
            and received < self._inferred_until * 1e9
        ):
            self._guard(connection, self.cancel, connection)
            return True
        return False

    def _refuse_rest(self) -> None:
        """Answer those who wait, for an inference or for a change to be made, when the time to end has come."""
        asking, self._asking = self._asking, []
        for connection in asking:
            connection.linger()
            refusal = Refusal(503, "the server is shutting down; what came of the call is in its log", _RETRY)
            self._guard(connection, self._send_refusal, connection, refusal)
        while self._waiting.count:
            connection = self._waiting.pop()
            connection.linger()
            refusal = Refusal(503, "the server is shutting down; the request was not started", _RETRY)
            self._guard(connection, self._send_refusal, connection, refusal)

    def _send_refusal(self, connection: Connection, refusal: Refusal) -> None:
        status, headers, body = encode_refusal(refusal)
        headers += self._cors
        environ = {**_UNREAD, **connection.template} if connection.head is None else connection.head.environ
        self._identify(environ)
        parts: list[Buffer] = [] if refusal.is_of_head else [body]
        size = self._send(connection, environ, status, headers, parts, sum(map(len, parts)))
        if self._observed:
            self.log.access(_ObservedResponse(status, headers, size), _Observed(environ), environ, timedelta())
        if self._access_log is not None:
            self._access_log.write(access_of(environ, status, size, time.monotonic_ns()))

    def _identify(self, environ: Environ) -> None:
        """Give a request an id unless its client did; an id that does not fit into a line of a log is none."""
        given = environ.get("HTTP_X_REQUEST_ID")
        if given is None or not is_request_id(given):
            environ["HTTP_X_REQUEST_ID"] = f"{self._id_prefix}-{next(self._id_numbers)}"

    def _answer(self, connection: Connection) -> None:
        """Have the application answer a request; `now` has to be up to date."""
        assert connection.head is not None
        environ = connection.head.environ
        self._started = self.now
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            log.info("worker %s reached max_requests after %s requests and ends", self.pid, self.nr)
            self.alive = False
        try:
            status, headers, parts, size = self._call(environ)
        except TryLaterError:
            environ.setdefault("ovms_rest.received", int(self._started * 1e9))  # from when on it waits
            self._asking.append(connection)
            self.nr -= 1
            return
        self.now = time.monotonic()  # an inference may have taken long
        if self._is_busy and not self._waiting.count:
            self._set_busy(False)  # before the client can know, who may send its next request to another
        size = self._send(connection, environ, status, headers, parts, size)
        if self._observed:
            self._observe(environ, status, headers, size, time.monotonic() - self._started)
        if self._access_log is not None:
            self._access_log.write(access_of(environ, status, size, int(self._started * 1e9)))

    def _call(self, environ: Environ) -> tuple[str, Headers, list[Buffer], int]:
        """Call the application; return status, headers, the parts of the body and their size."""
        answer: list[Any] = []

        def start_response(status: str, headers: Headers, exc_info: Any = None) -> Any:
            answer[:] = status, headers, []
            return answer[2].append

        try:
            if self._observed:
                self.cfg.pre_request(self, _Observed(environ))
            result: Iterable[Buffer] = self.wsgi(environ, start_response)
            try:
                parts = list(result)
            finally:
                if hasattr(result, "close"):
                    result.close()
            status, headers, written = answer
        except TryLaterError:
            raise
        except Exception:
            request_id, method, target = (environ[key] for key in ("HTTP_X_REQUEST_ID", "REQUEST_METHOD", "RAW_URI"))
            log.exception("error while answering request %s, %s %s", request_id, method, target)
            body = encode_error("internal error; the reason is in the log of the server")
            return "500 Internal Server Error", [("Content-Type", "application/json"), *self._cors], [body], len(body)
        if written:
            parts = written + parts
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        if size > SMALL_ANSWER and self.held + size > self.max_held:
            refusal = Refusal(503, describe_lack("a response", size, self.find_room()), _RETRY)
            status, headers, body = encode_refusal(refusal)
            return status, headers + self._cors, [body], len(body)
        return status, headers, parts, size

    def _send(
        self, connection: Connection, environ: Environ, status: str, headers: Headers, parts: list[Buffer], size: int
    ) -> int:
        """Send an answer whose body has so many bytes; return how many of them are sent."""
        if connection.keep_alive and self._has_to_close(connection):
            connection.linger()
        lines = self._server_lines + _connection_line(connection)
        answer = (status, lines, size, headers)
        if answer != self._last_answer:  # mostly it is the same
            has_none = status.startswith("204") or _has_field(headers, "content-length")  # RFC 9110 section 8.6
            length = [] if has_none else [("Content-Length", str(size))]
            try:
                self._last_head = encode_head(status, headers + length, lines)
            except ValueError:
                log.exception(
                    "the application answered what cannot be sent to request %s", environ["HTTP_X_REQUEST_ID"]
                )
                connection.close()
                return 0
            self._last_answer = (status, lines, size, headers.copy())  # a list may be changed and come again
            self._last_has_id = _has_field(headers, "x-request-id")
        end = "\r\n" if self._last_has_id else f"X-Request-ID: {environ['HTTP_X_REQUEST_ID']}\r\n\r\n"
        head = self._last_head + end.encode()
        if environ["REQUEST_METHOD"] == "HEAD":
            parts, size = [], 0
        total = len(head) + size
        if total <= SMALL_ANSWER:
            connection.send([b"".join([head, *parts])], total)
        else:
            connection.send([head, *parts], total)
        return size

    def _has_to_close(self, connection: Connection) -> bool:
        """Tell whether a connection has to go: the worker ends, keeps none alive, or has more than it can serve."""
        if not self.times.idle:
            return True
        if self.alive and not self._is_another_better_off():
            return False
        return not connection.has_more()  # what was received is answered

    def _is_another_better_off(self) -> bool:
        """Tell whether another worker has had nothing to do while this one has too much.

        Bodies that are larger than what the system buffers are not seen to wait during an inference that takes long;
        there the numbers of connections tell.
        """
        if self._waiting.count:
            return self.row.is_another_idle(time.monotonic_ns() - IDLE_NANOSECONDS)
        if self.now - self._started < IDLE_NANOSECONDS / 1e9:
            return False
        return self.row.is_another_idle(time.monotonic_ns() - IDLE_NANOSECONDS, len(self._connections) - 2)

    def _observe(self, environ: Environ, status: str, headers: Headers, size: int, seconds: float) -> None:
        """Tell gunicorn's hooks and access log of a request, for those who asked for it."""
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
        """Refuse what this worker does not do, before anything is started."""
        for name, allowed in (("proxy_protocol", "off"), ("http_protocols", ["h1"])):
            if getattr(cfg, name) != allowed:
                logger.error("gunicorn's setting %s is not supported, only %r is", name, allowed)
                sys.exit(1)


def _keep_freed_memory() -> None:
    """Have the C library keep memory of the size of bodies for the next ones, instead of asking for new pages.

    New pages cost more than a tensor of a few hundred kilobytes costs otherwise (see tests/benchmarks/README.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def _first(pair: tuple[float, Connection]) -> float:
    return pair[0]


def _read_terms(connection: Connection) -> Terms:
    assert connection.head is not None
    return read_terms(connection.head.environ)


def _has_connection(listener: socket.socket) -> bool:
    """Tell whether a connection lies there to be accepted."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def _has_field(headers: Headers, name: str) -> bool:
    return name in [field.lower() for field, _ in headers]


def _connection_line(connection: Connection) -> str:
    if not connection.keep_alive:
        return "Connection: close\r\n"
    http10 = connection.head is not None and connection.head.environ["SERVER_PROTOCOL"] == "HTTP/1.0"
    return "Connection: keep-alive\r\n" if http10 else ""


def _is_observed(cfg: Any, logger: Any) -> bool:
    """Tell whether anybody looks at single requests: an access log, or hooks of the user's."""
    hooks = (cfg.pre_request, PreRequest.default), (cfg.post_request, PostRequest.default)
    return logger.access_log_enabled or any(hook is not default for hook, default in hooks)


# What stands in the access log for a request that could not be read.
_UNREAD: Environ = {
    "REQUEST_METHOD": "-",
    "RAW_URI": "-",
    "PATH_INFO": "-",
    "QUERY_STRING": "",
    "SERVER_PROTOCOL": "HTTP/1.1",
}


class _Observed:
    """A request as gunicorn's hooks and access log know it."""

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
    """A response as gunicorn's hooks and access log know it."""

    def __init__(self, status: str, headers: Headers, size: int) -> None:
        self.status = status
        self.status_code = int(status.split()[0])
        self.headers = headers
        self.sent = self.response_length = size
        self.headers_sent = True
