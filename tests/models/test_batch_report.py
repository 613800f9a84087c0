"""Whether batches pay: what is measured, and the verdict on it."""

import model_zoo
import pytest
from openvino import Type

from ovms_rest.models.batch_report import Speed, _judge, measure_batches
from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.options import Preparation
from ovms_rest.models.runtime import Model


def load(tmp_path, model, limit=0):
    """Load a model, with a max_batch_size."""
    path = model_zoo.save(model, tmp_path / "m") / "1"
    made = Model("m", 1, path, plan_compilation("CPU", {}, cores=1), Preparation(batch_limit=limit))
    made.open(lambda: None)
    return made


@pytest.mark.parametrize(("limit", "sizes"), [(0, [1, 2, 4, 8, 16, 32]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (1, [1])])
def test_each_power_of_two_up_to_the_limit_is_measured(tmp_path, limit, sizes):
    report = measure_batches(load(tmp_path, model_zoo.relu(), limit))
    assert [speed.rows for speed in report.speeds] == sizes
    assert all(speed.seconds > 0 for speed in report.speeds)


def test_strings_and_state_are_measured(tmp_path):
    for name, model in {"strings": model_zoo.strings(), "state": model_zoo.accumulating()}.items():
        assert len(measure_batches(load(tmp_path / name, model, 2)).speeds) == 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_zoo.relu((1, 4)), "cannot infer batches: max_batch_size: input 'x' has the shape"),
        (model_zoo.passthrough(x=(Type.f32, ())), "cannot infer batches"),
        (
            model_zoo.totals(),
            "cannot infer batches: rows must not depend on each other, but output 'y' of a row changes",
        ),
        (model_zoo.cutting(), "cannot infer batches: output 'y' has the shape [4, 2] for 2 rows"),
    ],
)
def test_model_without_batches_has_a_reason(tmp_path, model, reason):
    report = measure_batches(load(tmp_path, model))
    assert not report.speeds
    assert report.verdict.startswith(reason)


@pytest.mark.parametrize(
    ("milliseconds", "is_set", "verdict"),
    [
        ({1: 8.0, 2: 8.2, 4: 9.0}, False, "max_batch_size 4 would pay: requests of one row are answered 3.4 times"),
        ({1: 8.0, 2: 8.2, 4: 9.0}, True, "max_batch_size pays: "),
        ({1: 8.0, 2: 16.0, 4: 32.0}, False, "max_batch_size would not pay: "),
        ({1: 8.0, 2: 16.0}, True, "max_batch_size does not pay: "),
        # Rows that are 32 times as fast save little of a request.
        (
            {1: 0.01, 32: 0.01},
            False,
            "max_batch_size would not pay: requests of one row are answered 1.1 times as fast",
        ),
        ({1: 4.0, 2: 2.2, 4: 4.3, 8: 8.7}, False, "max_batch_size 2 would pay"),
    ],
)
def test_verdict_counts_what_a_request_costs_besides(milliseconds, is_set, verdict):
    speeds = [Speed(rows, spent / 1e3) for rows, spent in milliseconds.items()]
    assert _judge(speeds, is_set).startswith(verdict)
