"""Trials of models in a throwaway process, so that a crashing or hanging model does not harm the arbiter."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ovms_rest.errors import LoadError
from ovms_rest.host.process_memory import resident_bytes
from ovms_rest.host.throwaway import STOPPED, EndedError, Send, start
from ovms_rest.models.batch_rows import check_rows
from ovms_rest.models.compilation import Compilation, maps_files
from ovms_rest.models.copies import NO_PLACE, ChangingError, Place, Source, copy_model
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.options import ModelOptions, parse_options
from ovms_rest.models.runtime import DEFAULT_LIMITS, Invented, Model


@dataclass(frozen=True, slots=True)
class Task:
    """The trial of a version: its directory or file, how to load it, and the place for copies of its files."""

    path: Path
    compilation: Compilation
    options: ModelOptions = ModelOptions()
    limits: ImageLimits = DEFAULT_LIMITS
    place: Place = NO_PLACE


class TrialResult(NamedTuple):
    """The outcome of a trial: the reason of a failure, "" for a model that may serve; its seconds and bytes of memory.

    `warning` says what the trial of a model that may serve could not show; `source` was tried, with the `invented`
    inputs. With `is_changing` the reason is only that the files were being written.
    """

    reason: str = ""
    seconds: float = 0.0
    memory: int = 0
    warning: str = ""
    source: Source | None = None
    is_changing: bool = False
    invented: Invented | None = None


def run_trials(
    tasks: Sequence[Task],
    timeout: float,
    begin: Callable[[int], None] = lambda index: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[TrialResult]:
    """Read and compile every model in a throwaway process, and infer once with it; return a result for each.

    Each model has `timeout` seconds; `begin` is called with its index before its trial. A model that ends the process
    is tried again in a process of its own, as a model before it may have done the damage. Once `stop` returns True, the
    rest is not tried.
    """
    results: list[TrialResult] = []
    while len(results) < len(tasks):
        if stop():
            return results + [TrialResult(STOPPED)] * (len(tasks) - len(results))
        results += _run_in_one_process(tasks, len(results), timeout, begin, stop)
    return results


def _run_in_one_process(
    tasks: Sequence[Task], first: int, timeout: float, begin: Callable[[int], None], stop: Callable[[], bool]
) -> list[TrialResult]:
    """Try models from the `first` in a new process until one ends or stalls it; return at least one result."""
    results: list[TrialResult] = []
    tasks = tasks[first:]
    descriptors = [descriptor for task in tasks for descriptor in task.place.descriptors]
    with start(try_models, tasks, stop, descriptors) as process:
        for index in range(len(tasks)):
            begin(first + index)
            try:
                results.append(_decode_result(process.receive(timeout)))
            except LoadError as error:
                if not (results and isinstance(error, EndedError)):
                    results.append(TrialResult(str(error)))
                break
    return results


def try_models(tasks: Sequence[dict[str, Any]], send: Send) -> None:
    """Try models one after the other, in the throwaway process; take Tasks and send TrialResults as JSON."""
    for task in map(_decode_task, tasks):
        started, before = time.monotonic(), resident_bytes()
        try:
            send(step="being copied")
            source = copy_model(task.path, task.place, maps_files(task.compilation))
            send(step="being read")
            changes = parse_options(task.options)
            model = Model("", 1, task.path, task.compilation, changes, task.limits, source)
            send(step="being compiled")
            model.compile()
            send(step="inferring for the first time")
            model.open(lambda: None)
            if model.batch_limit > 1:
                send(step="inferring two rows together")
                check_rows(model)
            source.check()
            memory, warning, invented = max(0, resident_bytes() - before), model.warning, model.invented
            del model
        except LoadError as error:
            send(reason=str(error), is_changing=isinstance(error, ChangingError))
        else:
            seconds = time.monotonic() - started
            send(seconds=seconds, memory=memory, warning=warning, source=source, invented=invented)


def _decode_result(result: dict[str, Any]) -> TrialResult:
    source = result.pop("source", None)
    if source is not None:
        source = Source(**source | {"stamp": tuple(map(tuple, source["stamp"]))})
    return TrialResult(**result, source=source)


def _decode_task(task: dict[str, Any]) -> Task:
    place = task["place"]
    return Task(
        Path(task["path"]),
        Compilation(**task["compilation"]),
        ModelOptions(**task["options"]),
        ImageLimits(**task["limits"]),
        Place(tuple(place["descriptors"]), place["directory"]),
    )
