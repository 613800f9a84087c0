"""Trying models in a throwaway process, so that one that crashes or hangs does not take the arbiter with it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ovms_rest.errors import LoadError
from ovms_rest.host.process_memory import resident_bytes
from ovms_rest.host.throwaway import STOPPED, EndedError, Tell, start
from ovms_rest.models.compilation import Compilation, maps_files
from ovms_rest.models.copies import ChangingError, Place, Source, copy_model
from ovms_rest.models.images import ImageLimits
from ovms_rest.models.options import ModelOptions
from ovms_rest.models.runtime import DEFAULT_LIMITS, NO_OPTIONS, Model


@dataclass(frozen=True, slots=True)
class Task:
    """A version to be tried: its directory or file, what is to be done with it, and where its files can be copied."""

    path: Path
    compilation: Compilation
    options: ModelOptions = NO_OPTIONS
    limits: ImageLimits = DEFAULT_LIMITS
    place: Place | None = None


class Proof(NamedTuple):
    """What came of a try: why the model must not serve, None when it may; seconds and bytes of memory that it took.

    `warning` is what the try did not show of a model that may serve, and `source` is what was tried. With `is_changing`
    the reason is only that the files were being written.
    """

    reason: str | None
    seconds: float = 0.0
    memory: int = 0
    warning: str = ""
    source: Source | None = None
    is_changing: bool = False


def prove(
    tasks: Sequence[Task],
    timeout: float,
    begin: Callable[[int], None] = lambda index: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Proof]:
    """Read, compile and infer every model once in a throwaway process.

    Each model has `timeout` seconds; `begin` is called with its place when its turn comes. One that ends the process
    gets another try in a process of its own before it is blamed, for the damage may have been done by a model before
    it. When `stop` says so, the rest is not tried.
    """
    proofs: list[Proof] = []
    while len(proofs) < len(tasks):
        if stop():
            return proofs + [Proof(STOPPED)] * (len(tasks) - len(proofs))
        done = len(proofs)

        def begin_one(index: int, done: int = done) -> None:
            begin(done + index)

        proofs += _attempt(tasks[done:], timeout, begin_one, stop)
    return proofs


def _attempt(
    tasks: Sequence[Task], timeout: float, begin: Callable[[int], None], stop: Callable[[], bool]
) -> list[Proof]:
    """Start a process and try models until all are through or one fails it; return the results, of one at least."""
    proofs: list[Proof] = []
    descriptors = [descriptor for task in tasks if task.place for descriptor in task.place.descriptors]
    with start(try_models, tasks, stop, descriptors) as process:
        for index in range(len(tasks)):
            begin(index)
            try:
                proofs.append(_decode_proof(process.answer(timeout)))
            except LoadError as error:
                if not (proofs and isinstance(error, EndedError)):
                    proofs.append(Proof(str(error)))
                break
    return proofs


def try_models(tasks: Sequence[dict[str, Any]], tell: Tell) -> None:
    """Try models one after the other, each a Task out of JSON, and tell the Proof of each: in the throwaway process."""
    for task in map(_decode, tasks):
        started, before = time.monotonic(), resident_bytes()
        try:
            tell(step="being copied")
            source = copy_model(task.path, task.place, maps_files(task.compilation))
            tell(step="being read")
            model = Model("", 1, task.path, task.compilation, task.options, task.limits, source)
            tell(step="being compiled")
            model.compile()
            tell(step="inferring for the first time")
            model.open(lambda: None)
            source.check()
            memory, warning = max(0, resident_bytes() - before), model.warning
            del model
        except LoadError as error:
            tell(reason=str(error), is_changing=isinstance(error, ChangingError))
        else:
            tell(reason=None, seconds=time.monotonic() - started, memory=memory, warning=warning, source=source)


def _decode_proof(proof: dict[str, Any]) -> Proof:
    source = proof.pop("source", None)
    if source is not None:
        source = Source(**source | {"state": tuple(map(tuple, source["state"]))})
    return Proof(**proof, source=source)


def _decode(task: dict[str, Any]) -> Task:
    place = task["place"]
    return Task(
        Path(task["path"]),
        Compilation(**task["compilation"]),
        ModelOptions(**task["options"]),
        ImageLimits(**task["limits"]),
        place and Place(tuple(place["descriptors"]), place["directory"]),
    )
