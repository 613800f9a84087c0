"""Rehearsals: an inference with each new pipeline before it serves, to find inputs that it computes.

They become the example for its clients; a pipeline that computes none of the inputs serves all the same. A rehearsal
runs in a fork of the arbiter, for custom code may crash or hang with inputs that no client would send.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ovms_rest.errors import InvalidRequestError, NoContentError, ServingError
from ovms_rest.host.forked import run_forked
from ovms_rest.log import log
from ovms_rest.models.example_requests import check_example, make_constant
from ovms_rest.models.registry import Entry
from ovms_rest.models.runtime import Model
from ovms_rest.models.servable import NOT_COUNTED, Servable
from ovms_rest.models.trial_shapes import Shape, choose_shapes, choose_usual_shapes
from ovms_rest.pipelines.execution import Pipeline
from ovms_rest.pipelines.plan import REQUEST_STEP, Plan
from ovms_rest.protocol.tensors import Array, copy_array

Arrays = Mapping[str, Array]

_SECONDS = 5.0
# The values of numbers that are tried: of integers and of others, as in `models.recovery`.
_VALUES = ((1, 0), (0, 0), (1, 1))
# Limits of the generated inputs, and of the elements of one of them.
_MOST_SHAPES = 6
_MOST_ELEMENTS = 2**22


def rehearse_pipelines(entries: dict[str, Entry], stop: Callable[[], bool] = lambda: False) -> dict[str, Entry]:
    """Give each pipeline that has not been rehearsed an example, if one is found before `stop` returns True.

    Return the same entries.
    """
    for name, entry in entries.items():
        for pipeline in entry.versions.values():
            if isinstance(pipeline, Pipeline) and not pipeline.is_rehearsed:
                pipeline.is_rehearsed = True
                _rehearse(name, entry, pipeline, stop)
    return entries


def _rehearse(name: str, entry: Entry, pipeline: Pipeline, stop: Callable[[], bool]) -> None:
    if not all(map(_is_shared, pipeline.dependencies)):
        return  # these would have to be compiled in the fork
    given = entry.example
    if given is not None:
        try:
            candidates: list[Arrays] = [check_example(given, pipeline.metadata)]
        except InvalidRequestError:
            return  # reported where the description of the API leaves it out
    else:
        candidates = list(itertools.islice(choose_inputs(pipeline.plan), _MOST_SHAPES * len(_VALUES)))
    index = run_forked(lambda: find_computable(pipeline, candidates), _SECONDS, stop)
    if index is not None and index < len(candidates):
        pipeline.example = candidates[index]
    elif given is not None and not stop():
        log.warning("pipeline %r does not compute its example, which is left out", name)
        entry.example = None


def _is_shared(model: Servable) -> bool:
    return isinstance(model, Model) and model.compilation.shared


def find_computable(pipeline: Pipeline, candidates: Sequence[Arrays]) -> int:
    """Open a pipeline with its models; return the index of the first inputs that it computes, or else their number.

    Inputs for which a demultiplexer makes no shards come last.
    """
    for model in pipeline.dependencies:
        model.counters = NOT_COUNTED
        model.open(lambda: None)
    pipeline.open(lambda: None)
    empty = len(candidates)
    for index, arrays in enumerate(candidates):
        try:
            pipeline.infer({name: copy_array(array) for name, array in arrays.items()})
        except NoContentError:
            empty = min(empty, index)
        except ServingError:
            continue
        else:
            return index
    return empty


def choose_inputs(plan: Plan) -> Iterator[Arrays]:
    """Yield inputs that the pipeline may compute; first those that its models have computed."""
    ports = list(plan.metadata.inputs.values())
    if any(port.dims is None for port in ports):
        return
    known = _find_known(plan)
    shapes: Iterator[Mapping[str, Shape]] = itertools.chain(
        choose_shapes(ports, [()] * len(ports)), choose_usual_shapes(ports)
    )
    if len(known) == len(ports):
        yield known
    for chosen in shapes:
        if sum(map(math.prod, chosen.values())) > _MOST_ELEMENTS:
            continue
        for integer, other in _VALUES:
            values = {"INT": integer, "UIN": integer}
            generated = {
                port.name: make_constant(port.datatype, chosen[port.name], values.get(port.datatype[:3], other))
                for port in ports
            }
            yield generated | known


def _find_known(plan: Plan) -> dict[str, Array]:
    """Return arrays for the inputs of the pipeline that its models take, from those that these have computed."""
    known: dict[str, Array] = {}
    for step in plan.steps:
        example = None if step.part.model is None else step.part.model.example
        for wire in step.wires:
            if wire.step != REQUEST_STEP or example is None:
                continue
            array = example[wire.tensor]
            if plan.count is not None and step.gathers != REQUEST_STEP and isinstance(array, np.ndarray):
                array = np.broadcast_to(array, (max(plan.count, 1), *array.shape))
            if plan.metadata.inputs[wire.item].holds(array.shape):
                known.setdefault(wire.item, array)
    return known
