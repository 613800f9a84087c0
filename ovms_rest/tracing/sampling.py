"""Which requests are recorded: the samplers of OpenTelemetry's OTEL_TRACES_SAMPLER."""

from collections.abc import Callable

from ovms_rest.tracing.context import SAMPLED, TraceContext

# Whether to record a request, from the context that its client sent, None for none, and the id of its trace.
Sampler = Callable[[TraceContext | None, str], bool]

DEFAULT = "parentbased_always_on"
NAMES = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
_PARENT_BASED = "parentbased_"
_TRACE_ID_BITS = 64  # that a ratio looks at, as in OpenTelemetry's SDK for Python: the low ones


def choose_sampler(name: str, argument: str) -> Sampler:
    """Return one of NAMES; `argument` is the ratio of those that take one, "" for all.

    Raises ValueError for an unknown name, and for a ratio that is not a number from 0 to 1.
    """
    if name not in NAMES:
        raise ValueError(f"OTEL_TRACES_SAMPLER is {name!r}, expected one of {', '.join(NAMES)}")
    root = name.removeprefix(_PARENT_BASED)
    bound: int = {"always_on": 2**_TRACE_ID_BITS, "always_off": 0}.get(root, 0)
    if root == "traceidratio":
        bound = round(_read_ratio(argument) * 2**_TRACE_ID_BITS)
    is_parent_based = name.startswith(_PARENT_BASED)

    def sample(parent: TraceContext | None, trace_id: str) -> bool:
        if is_parent_based and parent is not None:
            return bool(parent.flags & SAMPLED)
        return int(trace_id[-_TRACE_ID_BITS // 4 :], 16) < bound

    return sample


def _read_ratio(text: str) -> float:
    try:
        ratio = float(text or 1)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ValueError(f"OTEL_TRACES_SAMPLER_ARG is {text!r}, expected a number from 0 to 1")
    return ratio
