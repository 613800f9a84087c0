"""A hundred of the ONNX backend cases, the same every time; `run.py` runs all of them."""

import random

from onnx_cases import load_cases
from onnx_conformance import check, compute

COUNT = 100


def test_responses_to_onnx_cases_are_those_of_openvino(tmp_path):
    cases = load_cases()
    chosen = random.Random(0).sample(cases, 2 * COUNT)
    computed = []
    for case, reference in compute(chosen, tmp_path):
        if not reference.failed:
            computed.append((case, reference))
        if len(computed) == COUNT:
            break
    outcomes = list(check(computed, tmp_path))
    assert [outcome for outcome in outcomes if outcome.kind not in ("same", "refused")] == []
    assert sum(outcome.kind == "same" for outcome in outcomes) > 90
