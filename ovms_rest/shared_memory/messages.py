"""Changes that workers ask the arbiter for, and their outcomes, in the form in which they pass through the mailbox."""

from typing import Any, Literal, NamedTuple

from ovms_rest.errors import (
    ForbiddenError,
    InvalidConfigError,
    LoadFailedError,
    NotFoundError,
    ReloadError,
    ServingError,
    UnavailableError,
)

_ERRORS: dict[str, type[ServingError]] = {
    error.__name__: error
    for error in (ForbiddenError, InvalidConfigError, LoadFailedError, NotFoundError, ReloadError, UnavailableError)
}


class Change(NamedTuple):
    """A change of the registry: a reload of all files that changed, or one model to load or unload.

    The outcome is published under `id`, unless that is "". `config` is the configuration sent with a load. With
    `dependents` the pipelines that use an unloaded model are unloaded too.
    """

    action: Literal["reload", "load", "unload"] = "reload"
    name: str = ""
    config: dict[str, Any] | None = None
    dependents: bool = False
    id: str = ""


class Outcome(NamedTuple):
    """The outcome of a change: whether the registry changed, or the class and the message of an error."""

    has_changed: bool
    error: str = ""
    message: str = ""

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error:
            raise _ERRORS[self.error](self.message)
