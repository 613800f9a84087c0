"""All errors: those of requests, which are ServingErrors, those of the start, and those of a model.

A message is for the person who can act on it: what was wrong, what came, what is allowed. Only
`resources/error_handlers.py` knows the HTTP status of a ServingError.
"""

from collections.abc import Callable, Sequence


class ServingError(Exception):
    """A request that fails; the message goes to the client."""


class InvalidRequestError(ServingError):
    """The client's mistake: the request breaks the protocol or does not fit the model."""


class NotFoundError(ServingError):
    """The model or the version is not served."""


class BodyTooLargeError(ServingError):
    """The body, as received or decompressed, is over the limit."""


class UnsupportedEncodingError(ServingError):
    """The body has a `Content-Encoding` that is not supported."""


class NotReadyError(ServingError):
    """A configured model or pipeline does not serve."""


class ForbiddenError(ServingError):
    """A change of the service that is not allowed over HTTP from this client, or names a path that is not allowed."""


class ReloadError(ServingError):
    """A change of the registry failed; raised as this class itself only because of a bug."""


class InvalidConfigError(ReloadError):
    """The configuration in the config file, or in a load request, is invalid."""


class LoadFailedError(ReloadError):
    """A model or pipeline does not serve after a change."""


class UnavailableError(ReloadError):
    """A change is impossible for now: the system lacks a resource, or new workers do not become ready."""


class DeadlineError(ServingError):
    """The request waited for its inference (`waited_ns`) beyond its timeout."""

    def __init__(self, timeout_us: int, waited_ns: int) -> None:
        super().__init__(
            f"the request could not start within its timeout of {timeout_us} us; it waited {waited_ns // 1000} us"
        )
        self.waited_ns = waited_ns


class EndingError(ServingError):
    """The service is shutting down."""


class BusyError(ServingError):
    """The service is overloaded; the same request may succeed a little later."""


class TryLaterError(Exception):
    """A response is not ready yet. The request can be run again once `is_due()`, which is cheap, returns True."""

    def __init__(self, is_due: Callable[[], bool]) -> None:
        super().__init__()
        self.is_due = is_due


class InferenceError(ServingError):
    """The inference failed; OpenVINO's own text is in the log."""


class CrashedError(ServingError):
    """The request, or one with its inputs, has crashed a worker, and is not run again for now."""


class PausedError(ServingError):
    """The model has crashed several workers, or hung in them, and infers nothing for some seconds."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class NoContentError(ServingError):
    """The response is empty, because a demultiplexer of the pipeline produced no shards."""


class ConfigError(Exception):
    """Invalid settings or an invalid config file; `problems` has a line for each fault."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class LoadError(Exception):
    """A model that cannot be served; the message is the reason, in one line."""


class ShortageError(Exception):
    """The system lacks a resource for now, such as processes or descriptors; a later try may succeed."""
