"""Whether a model can infer requests together, and whether that pays: its speed with 1, 2, 4 and so on rows."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ovms_rest.errors import LoadError, ServingError
from ovms_rest.models.batch_rows import infer_rows, repeat_row
from ovms_rest.models.batching import Arrays, Batching
from ovms_rest.models.recovery import fill
from ovms_rest.models.runtime import Model

# The largest batch of a model that does not set `max_batch_size`.
_USUAL_LIMIT = 32
# Each size is inferred for so long, and this often at least.
_SECONDS, _LEAST = 0.3, 5
# What a request costs besides its inference (tests/benchmarks/overhead.py); it is not saved by a batch.
_REQUEST_SECONDS = 100e-6
# Batches pay if they make requests this many times as fast.
_WORTH = 1.2


class Speed(NamedTuple):
    """The median time of an inference of some rows."""

    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds

    @property
    def request_seconds(self) -> float:
        """The time of a request for one row."""
        return self.seconds / self.rows + _REQUEST_SECONDS


class BatchReport(NamedTuple):
    """The speeds by increasing number of rows, and what they mean; without speeds, why there are none."""

    speeds: list[Speed]
    verdict: str


def measure_batches(model: Model) -> BatchReport:
    """Infer with a model that was loaded, on one core."""
    limit = model.batch_limit or _USUAL_LIMIT
    try:
        Batching(model.metadata, limit, lambda arrays: {})
    except LoadError as error:
        return BatchReport([], f"cannot infer batches: {error}")
    make = _find_example(model)
    if make is None:
        return BatchReport([], 'no generated inputs can be computed; "trial" can name a file with a request')
    rows = infer_rows(model, make(2)) if limit > 1 else None
    if rows is not None and (fault := rows.find_other_shape() or rows.find_dependence()):
        return BatchReport([], f"cannot infer batches: {fault}")
    sizes = [2**exponent for exponent in range((limit - 1).bit_length())] + [limit]
    speeds: list[Speed] = []
    for rows in sizes:
        arrays = make(rows)
        try:
            speeds.append(Speed(rows, _measure(model, arrays)))
        except ServingError as error:
            return BatchReport(speeds, f"cannot infer a batch of {rows} rows: {error}")
    return BatchReport(speeds, _judge(speeds, model.batch_limit > 0))


def _find_example(model: Model) -> Callable[[int], Arrays] | None:
    """Return a function that makes inputs with a number of rows, None if the model can compute none of them."""
    examples: list[Arrays] = [model.trial] if model.trial is not None else []
    ports = list(model.metadata.inputs.values())
    for shapes in model.trial_shapes:
        examples += fill([replace(port, images=None) for port in ports], shapes)
    for example in examples:
        try:
            model.infer_alone(repeat_row(example, 1))
        except ServingError:
            continue
        return lambda rows, example=example: repeat_row(example, rows)  # type: ignore[misc]
    return None


def _measure(model: Model, arrays: Arrays) -> float:
    model.infer_alone(arrays)  # the first inference of a shape prepares the others
    seconds: list[float] = []
    end = time.monotonic() + _SECONDS
    while len(seconds) < _LEAST or time.monotonic() < end:
        began = time.perf_counter()
        model.infer_alone(arrays)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _judge(speeds: list[Speed], is_set: bool) -> str:
    best = min(speed.request_seconds for speed in speeds)
    rows = next(speed.rows for speed in speeds if speed.request_seconds <= best / 0.95)
    gain = f"requests of one row are answered {speeds[0].request_seconds / best:.1f} times as fast in batches of {rows}"
    if best * _WORTH > speeds[0].request_seconds:
        return f"max_batch_size {'does' if is_set else 'would'} not pay: {gain}"
    return f"{'max_batch_size pays' if is_set else f'max_batch_size {rows} would pay'}: {gain}"
