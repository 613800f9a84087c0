"""What the arbiter prepares for traces before it forks, if spans are to be sent."""

from collections.abc import Mapping
from typing import NamedTuple

from ovms_rest.tracing.channel import SpanChannel
from ovms_rest.tracing.sampling import Sampler
from ovms_rest.tracing.settings import find_endpoint, read_tracing


class Tracing(NamedTuple):
    """Which requests the workers record, the way of their spans, and the URL that they are sent to, for the log."""

    sample: Sampler
    channel: SpanChannel
    endpoint: str


def prepare_tracing(environ: Mapping[str, str], slots: int) -> Tracing | None:
    """Return what workers with slots below `slots` need, None if no spans are to be sent."""
    sample = read_tracing(environ)
    return None if sample is None else Tracing(sample, SpanChannel(slots), find_endpoint(environ))
