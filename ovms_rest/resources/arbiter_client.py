"""The workers' side of changes: asking the arbiter for them over the mailbox, and reading what it publishes."""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ovms_rest.errors import BusyError, TryLaterError
from ovms_rest.models.registry import ModelRegistry
from ovms_rest.shared_memory.mailbox import Mailbox
from ovms_rest.shared_memory.messages import Change, Outcome


class ArbiterClient:
    """Asks the arbiter for changes.

    A call raises TryLaterError until the workers serve the change, and then takes the same `ticket`, a dictionary that
    is empty at the first call. It raises the errors of `ServingError` with which changes fail, BusyError when too many
    changes are queued or the service is shutting down, and InvalidRequestError for a message that is too large.
    """

    def __init__(self, mailbox: Mailbox, models: ModelRegistry, is_ending: Callable[[], bool]) -> None:
        """Use the arbiter's mailbox and registry; `is_ending` returns whether the service is shutting down."""
        self._mailbox = mailbox
        self._models = models
        self._is_ending = is_ending

    def status(self) -> dict[str, Any]:
        """Return the status of all versions in OVMS's format; those that serve mention an invalid config file."""
        status = self._models.status()
        fault = (self._mailbox.read() or {}).get("fault")
        if fault:
            for entry in status.values():
                for version in entry["model_version_status"]:
                    status_of = version["status"]
                    if version["state"] == "AVAILABLE" and status_of["error_message"] == "OK":
                        status_of["error_message"] = f"still serves as before; the config is invalid now: {fault}"
        return status

    def request(self, ticket: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Reload; return whether the registry changed, and the status of all models.

        The status is the arbiter's: another reload may have replaced the generation of this worker meanwhile.
        """
        published = self._ask(ticket, Change())
        return Outcome(*published["outcomes"][ticket["id"]]).has_changed, published["models"]

    def load_model(self, ticket: dict[str, Any], name: str, config: dict[str, Any] | None) -> None:
        """Load a model as the config file says, or with a configuration of its own."""
        self._ask(ticket, Change("load", name, config))

    def unload_model(self, ticket: dict[str, Any], name: str, dependents: bool) -> None:
        """Unload a model, with `dependents` also the pipelines that use it."""
        self._ask(ticket, Change("unload", name, dependents=dependents))

    def _ask(self, ticket: dict[str, Any], change: Change) -> dict[str, Any]:
        """Send a change to the arbiter, once per ticket; return what it published with the outcome."""
        is_ending = self._is_ending()  # read first: no outcome follows then, but one may have been published before
        if is_ending and not ("id" in ticket and self._is_made(ticket)):
            raise BusyError("the service is shutting down and accepts no changes")
        if "id" not in ticket:
            # Process ids repeat.
            ticket.update(id=f"{os.getpid()}-{time.monotonic_ns()}", writes=self._mailbox.writes())
            self._mailbox.send(change._replace(id=ticket["id"])._asdict())
        if not self._is_made(ticket):
            raise TryLaterError(partial(self._is_due, ticket))
        published: dict[str, Any] = ticket["published"]
        Outcome(*published["outcomes"][ticket["id"]]).check()
        return published

    def _is_due(self, ticket: dict[str, Any]) -> bool:
        return self._is_made(ticket) or self._is_ending()

    def _is_made(self, ticket: dict[str, Any]) -> bool:
        """Return whether the arbiter has published the outcome of a change, and keep it in the ticket."""
        writes = self._mailbox.writes()
        if "published" not in ticket and writes != ticket["writes"] and (published := self._mailbox.read()) is not None:
            ticket["writes"] = writes
            if ticket["id"] in published["outcomes"]:
                ticket["published"] = published
        return "published" in ticket
