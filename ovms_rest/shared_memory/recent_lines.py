"""The last warnings and errors in the logs of all processes, in memory that they share.

The arbiter and every worker slot have a ring of records each, and a process writes its own ring only, without a lock.
So no process loses its lines because another one writes many. The lines of a worker that died stay until its
successors in the slot have overwritten them.

A record is numbered last, after its fields; a reader skips records whose number changes meanwhile.
"""

import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from ovms_rest.log import log
from ovms_rest.protocol.words import escape

# The number of records in a ring, and the bytes of a record; longer texts are cut. Unused pages take no memory.
ARBITER_RECORDS: Final = 256
WORKER_RECORDS: Final = 16
_RECORD_BYTES: Final = 1024
# The most lines that a reader gets.
MAX_LINES: Final = 200

# Before the text: nanoseconds since 1970, process id, level, and the text's length. The number is eight bytes before.
_FIELDS = struct.Struct("=qqqq")
_TEXT: Final = 8 + _FIELDS.size
MAX_TEXT_BYTES: Final = _RECORD_BYTES - _TEXT
_LOGGERS = (logging.getLogger("gunicorn.error"), log)


class Line(NamedTuple):
    """A line of a log; `time` is in seconds since 1970."""

    time: float
    process: int
    level: str
    text: str


class RecentLines(logging.Filter):
    """The rings; created in the arbiter before it forks. As a filter of loggers, it notes warnings and errors."""

    def __init__(self, slots: int) -> None:
        """Allocate the rings of the arbiter and of this number of worker slots."""
        super().__init__()
        self._slots = slots
        self._claimed = mmap.mmap(-1, slots)
        records = ARBITER_RECORDS + slots * WORKER_RECORDS
        self._memory = mmap.mmap(-1, records * _RECORD_BYTES)
        self._numbers = memoryview(self._memory).cast("q")
        self._use(0, ARBITER_RECORDS)

    def install(self) -> None:
        """Note the lines of gunicorn's logger and ours from now on, in this process and those forked from it."""
        for logger in _LOGGERS:
            for other in [other for other in logger.filters if isinstance(other, RecentLines)]:
                logger.removeFilter(other)
            logger.addFilter(self)

    def claim(self, slot: int) -> None:
        """Write the ring of this worker slot from now on."""
        self._claimed[slot] = 1
        self._use(ARBITER_RECORDS + slot * WORKER_RECORDS, WORKER_RECORDS)

    def _use(self, first: int, records: int) -> None:
        self._first, self._records = first, records
        self._next = 1 + max(self._number(record) for record in range(first, first + records))

    def filter(self, record: logging.LogRecord) -> bool:
        """Note a record if it is a warning or an error; let every record pass."""
        if record.levelno >= logging.WARNING:
            try:
                text = record.getMessage()
            except Exception:  # a bug of the caller, which the handlers report
                return True
            error = record.exc_info[1] if record.exc_info else None
            self.note(record.levelno, text if error is None else f"{text}: {type(error).__name__}: {error}")
        return True

    def note(self, level: int, text: str) -> None:
        """Write a line of a level of Python's into the ring of this process."""
        number, self._next = self._next, self._next + 1  # a signal handler may log meanwhile
        record = self._first + number % self._records
        start = record * _RECORD_BYTES
        data = escape(text).encode(errors="backslashreplace")[:MAX_TEXT_BYTES]
        self._numbers[start // 8] = 0
        _FIELDS.pack_into(self._memory, start + 8, time.time_ns(), os.getpid(), level, len(data))
        self._memory[start + _TEXT : start + _TEXT + len(data)] = data
        self._numbers[start // 8] = number

    def read(self) -> list[Line]:
        """Return the last lines of all processes, the newest at the end."""
        found = [*self._read_ring(0, ARBITER_RECORDS)]
        slot = self._claimed.find(b"\1")
        while slot >= 0:
            found += self._read_ring(ARBITER_RECORDS + slot * WORKER_RECORDS, WORKER_RECORDS)
            slot = self._claimed.find(b"\1", slot + 1)
        return [line for _, _, line in sorted(found)[-MAX_LINES:]]

    def _read_ring(self, first: int, records: int) -> Iterator[tuple[int, int, Line]]:
        """Yield the time and the number of each line, to sort by, and the line."""
        for record in range(first, first + records):
            number, start = self._number(record), record * _RECORD_BYTES
            if not number:
                continue
            data = self._memory[start + 8 : start + _RECORD_BYTES]
            if self._number(record) != number:  # being overwritten
                continue
            written_ns, process, level, length = _FIELDS.unpack_from(data)
            text = data[_FIELDS.size : _FIELDS.size + length].decode(errors="replace")
            yield written_ns, number, Line(written_ns / 1e9, process, logging.getLevelName(level), text)

    def _number(self, record: int) -> int:
        return self._numbers[record * _RECORD_BYTES // 8]
