"""The workers' side of changes, with a real mailbox and a test in the place of the arbiter."""

import os
import signal

import pytest

from ovms_rest.errors import BusyError, LoadFailedError, TryLaterError
from ovms_rest.models.registry import Entry, ModelRegistry
from ovms_rest.resources.arbiter_client import ArbiterClient
from ovms_rest.shared_memory.mailbox import CONTROL, Mailbox
from ovms_rest.shared_memory.messages import Change
from ovms_rest.shared_memory.table import WorkerTable


@pytest.fixture
def mailbox(monkeypatch):
    monkeypatch.setattr(os, "getppid", os.getpid)  # this process is the arbiter and a worker
    before = signal.signal(CONTROL, signal.SIG_IGN)
    yield Mailbox()
    signal.signal(CONTROL, before)


@pytest.fixture
def table():
    return WorkerTable(1, 1)


@pytest.fixture
def client(mailbox, table):
    models = ModelRegistry({"m": Entry({1: None}), "n": Entry(reason="broken")})
    return ArbiterClient(mailbox, models, table.is_ending)


def publish(mailbox, fault="", **outcomes):
    mailbox.publish({"models": {"of": "the arbiter"}, "outcomes": outcomes, "fault": fault})


def test_change_is_sent_once_and_is_due_when_its_own_outcome_is_published(mailbox, client):
    ticket = {}
    for _ in range(3):
        with pytest.raises(TryLaterError) as caught:
            client.load_model(ticket, "m", {"nireq": 2})
    (message,) = mailbox.receive()
    assert Change(**message) == Change("load", "m", {"nireq": 2}, id=ticket["id"])
    assert not caught.value.is_due()
    publish(mailbox, another=[True, "", ""])
    assert not caught.value.is_due()
    publish(mailbox, **{ticket["id"]: [False, "LoadFailedError", "the reason"]})
    assert caught.value.is_due()
    publish(mailbox)
    assert caught.value.is_due(), "the outcome is kept in the ticket"
    with pytest.raises(LoadFailedError, match=r"^the reason$"):
        client.load_model(ticket, "m", {"nireq": 2})


def test_reload_returns_whether_the_registry_changed_and_the_status_of_the_arbiter(mailbox, client):
    for has_changed in (True, False):
        ticket = {}
        with pytest.raises(TryLaterError):
            client.request(ticket)
        publish(mailbox, **{ticket["id"]: [has_changed, "", ""]})
        assert client.request(ticket) == (has_changed, {"of": "the arbiter"})


def test_shutdown_ends_calls_that_wait_and_refuses_others(mailbox, client, table):
    made, waiting, late = {}, {}, {}
    for ticket in (made, waiting):
        with pytest.raises(TryLaterError) as caught:
            client.request(ticket)
    publish(mailbox, **{made["id"]: [True, "", ""]})
    assert not caught.value.is_due()
    table.set_ending()
    assert caught.value.is_due()
    for ticket in (waiting, late):
        with pytest.raises(BusyError, match=r"^the service is shutting down and accepts no changes$"):
            client.request(ticket)
    assert client.request(made) == (True, {"of": "the arbiter"})
    assert [message["id"] for message in mailbox.receive()] == [made["id"], waiting["id"]]


def test_status_of_versions_that_serve_mentions_an_invalid_config_file(mailbox, client):
    def messages():
        (m,), (n,) = (entry["model_version_status"] for entry in client.status().values())
        return m["status"]["error_message"], n["status"]["error_message"]

    assert messages() == ("OK", "broken")
    publish(mailbox, fault="the fault")
    assert messages() == ("still serves as before; the config is invalid now: the fault", "broken")
