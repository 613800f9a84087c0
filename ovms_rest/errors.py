"""What can go wrong: with a request, as one family; with the start; with one model.

The message is written for the person who has to act on it: what was at fault, what came, what is allowed. Which HTTP
status a ServingError becomes stands in `serving.error_handlers`, nowhere else.
"""

from collections.abc import Callable, Sequence


class ServingError(Exception):
    """A request that cannot be answered as asked; its text goes to the client."""


class InvalidRequestError(ServingError):
    """The request breaks the protocol or does not fit the model: the client's mistake."""


class NotFoundError(ServingError):
    """The model or the version is not served."""


class BodyTooLargeError(ServingError):
    """The body, or what it decompresses to, is over the limit."""


class UnsupportedEncodingError(ServingError):
    """The body has a `Content-Encoding` that cannot be undone."""


class NotReadyError(ServingError):
    """Something that is configured does not serve."""


class ForbiddenError(ServingError):
    """A change of the service that is not allowed over HTTP from this client, or names a path that is not allowed."""


class ReloadError(ServingError):
    """A change of the registry that failed; of this class itself, because of a bug."""


class InvalidConfigError(ReloadError):
    """The configuration of a change is invalid, that in the config file or the one sent with a load."""


class LoadFailedError(ReloadError):
    """A model or pipeline does not serve after a change."""


class UnavailableError(ReloadError):
    """A change is impossible for now: the system lacks a resource, or new workers do not become ready."""


class DeadlineError(ServingError):
    """The request waited longer for its inference than it allows: `waited_ns`."""

    def __init__(self, timeout_us: int, waited_ns: int) -> None:
        """Write the message."""
        super().__init__(
            f"the request could not start within its timeout of {timeout_us} us, it waited {waited_ns // 1000} us"
        )
        self.waited_ns = waited_ns


class EndingError(ServingError):
    """The service is shutting down."""


class BusyError(ServingError):
    """There is too much to do already; the same request may succeed a little later."""


class TryLaterError(Exception):
    """A response is not ready yet. The request can be run again once `is_due()`, which is cheap, returns True."""

    def __init__(self, is_due: Callable[[], bool]) -> None:
        super().__init__()
        self.is_due = is_due


class InferenceError(ServingError):
    """The model failed at this request; OpenVINO's own text is in the log."""


class NoContentError(ServingError):
    """There is nothing to answer: a demultiplexer of a pipeline has found nothing to go on with."""


class ConfigError(Exception):
    """Settings or a config file that the service cannot start with; `problems` has a line for each fault."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Keep the lines."""
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class LoadError(Exception):
    """A model that cannot be served; its text is the reason, in one line."""


class ShortageError(Exception):
    """The system lacks something for now, say processes or descriptors; its text names it. A later try may succeed."""
