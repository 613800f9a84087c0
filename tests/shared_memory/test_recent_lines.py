"""The last warnings and errors of all processes."""

import logging
import os

import pytest
from forking import fork, join

from ovms_rest.log import log
from ovms_rest.shared_memory.recent_lines import ARBITER_RECORDS, MAX_LINES, MAX_TEXT_BYTES, WORKER_RECORDS, RecentLines


@pytest.fixture
def lines(monkeypatch):
    """Installed lines; other filters come back at the end."""
    parent = logging.getLogger("gunicorn.error")
    for logger in (parent, log):
        monkeypatch.setattr(logger, "filters", list(logger.filters))
    recent = RecentLines(4)
    recent.install()
    return recent


def texts(lines):
    return [line.text for line in lines.read()]


def test_warnings_and_errors_are_noted_in_the_order_of_time(lines):
    log.info("nothing")
    log.warning("first %d", 1)
    logging.getLogger("gunicorn.error").critical("second")
    assert [(line.level, line.text, line.process) for line in lines.read()] == [
        ("WARNING", "first 1", os.getpid()),
        ("CRITICAL", "second", os.getpid()),
    ]
    first, second = lines.read()
    assert 0 <= second.time - first.time < 60


def test_lines_of_all_processes_are_read_in_each(lines):
    def work(slot):
        lines.claim(slot)
        log.error("of slot %d", slot)

    log.error("of the arbiter")
    for slot in (2, 0):
        join(fork(lambda slot=slot: work(slot)))
    join(fork(lambda: check(texts(lines))))
    assert texts(lines) == ["of the arbiter", "of slot 2", "of slot 0"]


def check(found):
    assert len(found) == 3


def test_worker_that_logs_much_displaces_its_own_lines_only(lines):
    def work(count):
        lines.claim(1)
        for number in range(count):
            log.warning("%d", number)

    log.error("of the arbiter")
    join(fork(lambda: work(WORKER_RECORDS * 2 + 3)))
    expected = [str(number) for number in range(WORKER_RECORDS + 3, WORKER_RECORDS * 2 + 3)]
    assert texts(lines) == ["of the arbiter", *expected]


def test_successor_in_a_slot_keeps_the_lines_of_a_worker_that_died(lines):
    def work(text):
        lines.claim(1)
        log.error(text)

    join(fork(lambda: work("last words")))
    join(fork(lambda: work("first words")))
    assert texts(lines) == ["last words", "first words"]


def test_number_of_lines_and_their_length_are_limited(lines):
    for number in range(ARBITER_RECORDS + 1):
        log.error("%d", number)
    found = texts(lines)
    assert (len(found), found[-1]) == (MAX_LINES, str(ARBITER_RECORDS))
    log.error("\u00e4" * 2000)
    assert texts(lines)[-1].rstrip("\ufffd") == "\u00e4" * (MAX_TEXT_BYTES // 2)


def test_line_is_one_line_without_a_traceback_but_with_its_error(lines):
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        log.exception("it\nfailed")
    assert texts(lines) == [r"it\nfailed: ValueError: bad\nvalue"]


def test_record_with_wrong_arguments_is_left_to_the_handlers(lines, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.error("%d", "x")
    assert texts(lines) == []


def test_record_that_is_being_overwritten_is_skipped(lines):
    log.error("whole")
    log.error("torn")
    lines._numbers[2 * 1024 // 8] = 0  # as while its fields are written
    assert texts(lines) == ["whole"]


def test_only_the_rings_installed_last_are_written(lines):
    other = RecentLines(1)
    other.install()
    log.error("x")
    assert (texts(lines), texts(other)) == ([], ["x"])
