"""The ONNX backend cases, served and in process: those refused or computed differently from OpenVINO."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx_cases import Case
from onnx_client import DATATYPES, find_faults
from onnx_reference import EXACT, Reference, Task, assign, compute_all
from service import Service, serve, write_config

# Cases that cannot be compared with OpenVINO, and why.
INCOMPARABLE = {"identity_opt": "its data is an optional sequence, which OpenVINO reads as a tensor"}

# Cases that are not served, with the beginning of the reason. For those of datatypes without a name see `find_refusal`.
REFUSED = {
    "constant": "the model has no inputs"  # and a request of KServe v2 has at least one
}

# Cases that OpenVINO computes wrongly and the service correctly, so that ONNX's own outputs are expected.
MENDED = {
    "tile": "the CPU plugin leaves the output of a Tile with computed repeats unwritten (ovms_rest/models/tiles.py)"
}


class Outcome(NamedTuple):
    """The outcome of a case: "same", "refused" rightly, "incomparable", "unreadable" for OpenVINO, or "fault"."""

    case: Case
    kind: str
    details: tuple[str, ...] = ()


def save(case: Case, directory: Path) -> Path:
    """Write the model of a case as version 1 below the directory; return its file."""
    file = directory / case.name / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    onnx.save(case.model, file)
    return file


def compute(cases: Sequence[Case], directory: Path, is_dynamic: bool = False) -> Iterator[tuple[Case, Reference]]:
    """Write the models of cases below a directory, and have OpenVINO compute them."""
    tasks = (Task(save(case, directory), [each.inputs for each in case.data_sets], is_dynamic) for case in cases)
    yield from zip(cases, compute_all(tasks), strict=True)


def check(computed: Sequence[tuple[Case, Reference]], directory: Path, is_dynamic: bool = False) -> Iterator[Outcome]:
    """Serve models that `compute` has written and compare every response with OpenVINO's outputs.

    Models that OpenVINO does not compile with dynamic shapes are left out: the dims that they need are unknown.
    """
    if is_dynamic:
        yield from (_leave_out(case, reference) for case, reference in computed if reference.failed)
        computed = [(case, reference) for case, reference in computed if not reference.failed]
    models = [_configure(case, reference, is_dynamic) for case, reference in computed]
    (directory / "service").mkdir(exist_ok=True)
    with serve(directory / "service", "-w", "1", config=write_config(directory, *models)) as service:
        for case, reference in computed:
            yield _check(service, case, reference)


def _configure(case: Case, reference: Reference, is_dynamic: bool) -> dict[str, Any]:
    model = {"name": case.name, "base_path": case.name, "plugin_config": EXACT}
    if is_dynamic:
        arrays = assign(reference.inputs, case.data_sets[0].inputs)
        model["shape"] = {
            min(names): [-1] * array.ndim for (names, _), array in zip(reference.inputs, arrays, strict=True)
        }
    return model


def _check(service: Service, case: Case, reference: Reference) -> Outcome:
    if case.name in INCOMPARABLE:
        return Outcome(case, "incomparable", (INCOMPARABLE[case.name],))
    ready = service.get(f"/v2/models/{case.name}/ready")
    reason = "" if ready.status == 200 else ready.json()["error"]
    if refusal := find_refusal(case, reference):
        return Outcome(case, "refused" if refusal in reason else "fault", (reason or "is served",))
    if reference.failed:
        kind, details = ("unreadable", (reason,)) if reason else ("fault", ("is served",))
        return Outcome(case, kind, details + _leave_out(case, reference).details)
    if case.name in MENDED:
        reference = reference._replace(results=tuple(tuple(each.outputs.values()) for each in case.data_sets))
    faults = tuple(find_faults(service, case.name, [each.inputs for each in case.data_sets], reference))
    return Outcome(case, "fault" if faults else "same", faults)


def _leave_out(case: Case, reference: Reference) -> Outcome:
    reason = f"OpenVINO: {reference.failed}: {' '.join(reference.reason.split())[:300]}"
    return Outcome(case, "unreadable", (reason,))


def find_refusal(case: Case, reference: Reference) -> str:
    """Return the reason for which a case must not be served, "" if it must be."""
    for _, kind in (*reference.inputs, *reference.outputs):
        if kind not in DATATYPES:
            return f"KServe v2 has no datatype for {kind}"
    return REFUSED.get(case.name, "")
