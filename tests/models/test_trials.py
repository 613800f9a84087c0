"""Trials of models in a throwaway process: problems of one are reported and do not affect the others."""

from dataclasses import replace

import model_zoo
from timeouts import keep_trying

from ovms_rest.models.compilation import plan_compilation
from ovms_rest.models.options import ModelOptions
from ovms_rest.models.trials import Task, run_trials


def task(base_path, **plugin_config):
    return Task(base_path / "1" / "model.xml", plan_compilation("CPU", plugin_config, cores=2))


def reasons_of(tasks, timeout=60):
    return [result.reason for result in run_trials(tasks, timeout)]


def test_good_models_have_no_reason(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "a")
    model_zoo.save(model_zoo.strings(), tmp_path / "b")
    latency = task(tmp_path / "a", PERFORMANCE_HINT="LATENCY")
    assert reasons_of([task(tmp_path / "a"), task(tmp_path / "b"), latency]) == ["", "", ""]


def test_the_inputs_that_a_model_has_computed_are_reported(tmp_path):
    model_zoo.save(model_zoo.split(), tmp_path / "split")
    model_zoo.save(model_zoo.relu((-1, 4)), tmp_path / "relu")
    relu, split = run_trials([task(tmp_path / "relu"), task(tmp_path / "split")], timeout=60)
    assert relu.invented == {"x": [[1, 4], 0]}
    assert split.invented is None


def test_no_models_have_no_results():
    assert run_trials([], timeout=60) == []


def test_crashing_model_is_named_and_the_others_are_tried(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "good")
    model_zoo.save_crashing(tmp_path / "bad")
    tasks = [task(tmp_path / name) for name in ("good", "bad", "good", "bad")]
    crash = "ended its trial process with SIGSEGV while being read"
    assert reasons_of(tasks) == ["", crash, "", crash]


def test_hanging_model_is_stopped_and_the_others_are_tried(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "good")
    model_zoo.save(model_zoo.endless(), tmp_path / "bad")
    tasks = [task(tmp_path / name) for name in ("good", "bad", "good")]
    step = "while inferring for the first time"
    timeout, reasons = keep_trying(
        lambda timeout: reasons_of(tasks, timeout),
        lambda reasons: not reasons[0] and reasons[1].endswith(step) and not reasons[2],
    )
    assert reasons == ["", f"timed out after {timeout} s {step}", ""]


def test_model_refused_by_openvino_has_the_reason(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "good")
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "model.xml").write_text("<net garbage")
    reasons = reasons_of([task(tmp_path / "bad"), task(tmp_path / "good", NO_SUCH_KEY=1)])
    assert reasons[0].startswith(f"cannot read {tmp_path}/bad/1/model.xml: Unable to read the model")
    assert "NO_SUCH_KEY" in reasons[1]


def test_model_whose_rows_depend_on_each_other_is_refused_with_max_batch_size(tmp_path):
    models = {"relu": model_zoo.relu(), "totals": model_zoo.totals(), "cutting": model_zoo.cutting()}
    for name, model in models.items():
        model_zoo.save(model, tmp_path / name)

    def reasons(**options):
        return reasons_of([replace(task(tmp_path / name), options=ModelOptions(**options)) for name in models])

    assert reasons() == reasons(max_batch_size=1) == reasons(max_batch_size=4, trial=False) == ["", "", ""]
    assert reasons(max_batch_size=4) == [
        "",
        "max_batch_size: rows must not depend on each other, but output 'y' of a row changes when it is not alone",
        "",
    ]


def test_process_that_cannot_start_fails_every_model_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert reasons_of([task(tmp_path / "a")] * 2) == [
        "ended its trial process with exit code 1 while starting",
        "ended its trial process with exit code 1 while starting",
    ]


def test_time_and_memory_of_a_model_are_measured(tmp_path):
    model_zoo.save(model_zoo.resnet50(), tmp_path / "a")
    (result,) = run_trials([task(tmp_path / "a")], timeout=60)
    assert 0 < result.seconds < 60
    assert 50 * 2**20 < result.memory < 2**30


def test_begin_is_called_with_each_index(tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "good")
    model_zoo.save_crashing(tmp_path / "bad")
    begun = []
    run_trials([task(tmp_path / name) for name in ("good", "bad", "good")], 60, begun.append)
    assert [turn for index, turn in enumerate(begun) if turn not in begun[:index]] == [0, 1, 2]
