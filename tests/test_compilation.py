"""How a model is compiled, by its configuration and the cores of the machine."""

import pytest

from ovms_rest.models.compilation import Compilation, plan_compilation

ONE_THREAD = {"NUM_STREAMS": 0, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
PLAIN = "one thread in each worker"


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_a_model_without_plugin_config_is_shared(cores):
    assert plan_compilation("CPU", {}, cores) == Compilation("CPU", ONE_THREAD, shared=True, reason=PLAIN)


@pytest.mark.parametrize(
    ("plugin_config", "reason"),
    [
        ({"PERFORMANCE_HINT": "THROUGHPUT"}, f"{PLAIN} serve what PERFORMANCE_HINT=THROUGHPUT asks for"),
        ({"PERFORMANCE_HINT": "CUMULATIVE_THROUGHPUT"}, None),
        ({"PERFORMANCE_HINT": ""}, None),
        ({"NUM_STREAMS": 4}, f"{PLAIN} serve what NUM_STREAMS=4 asks for"),
        ({"NUM_STREAMS": "AUTO"}, f"{PLAIN} serve what NUM_STREAMS=AUTO asks for"),
        ({"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}, None),
        ({"INFERENCE_NUM_THREADS": 0}, None),
        ({"INFERENCE_NUM_THREADS": "1"}, None),
        ({"INFERENCE_NUM_THREADS": 1.0}, None),
        ({"ENABLE_CPU_PINNING": True}, f"{PLAIN} serve what ENABLE_CPU_PINNING=True asks for"),
        ({"ENABLE_CPU_PINNING": "YES"}, None),
        (
            {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "8"},
            f"{PLAIN} serve what PERFORMANCE_HINT=THROUGHPUT, NUM_STREAMS=8 asks for",
        ),
    ],
)
def test_what_one_thread_in_each_worker_serves_as_well_is_shared(plugin_config, reason):
    plan = plan_compilation("CPU", plugin_config, 2)
    assert (plan.device, plan.properties, plan.shared) == ("CPU", ONE_THREAD, True)
    assert reason in (None, plan.reason)


def test_the_reason_leaves_out_properties_that_are_kept():
    plan = plan_compilation("CPU", {"INFERENCE_PRECISION_HINT": "f32"}, 2)
    assert plan.reason == PLAIN


def test_properties_that_have_nothing_to_do_with_threads_are_kept():
    kept = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": "/srv/cache", "LOG_LEVEL": "LOG_NONE"}
    plan = plan_compilation("CPU", kept | {"NUM_STREAMS": 2}, 2)
    assert plan == Compilation(
        "CPU", kept | ONE_THREAD, shared=True, reason=f"{PLAIN} serve what NUM_STREAMS=2 asks for"
    )


@pytest.mark.parametrize(
    ("target_device", "plugin_config", "reason"),
    [
        ("GPU", {}, "target_device is GPU"),
        ("AUTO", {"PERFORMANCE_HINT": "LATENCY"}, "target_device is AUTO"),
        ("HETERO:GPU,CPU", {"INFERENCE_NUM_THREADS": 1}, "target_device is HETERO:GPU,CPU"),
        ("CPU", {"INFERENCE_NUM_THREADS": 2}, "INFERENCE_NUM_THREADS is 2"),
        ("CPU", {"INFERENCE_NUM_THREADS": "4", "NUM_STREAMS": 2}, "INFERENCE_NUM_THREADS is 4"),
        ("CPU", {"INFERENCE_NUM_THREADS": "many"}, "INFERENCE_NUM_THREADS is many"),
        ("CPU", {"INFERENCE_NUM_THREADS": ""}, "INFERENCE_NUM_THREADS is "),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY"}, "PERFORMANCE_HINT is LATENCY"),
        ("CPU", {"PERFORMANCE_HINT": "latency"}, "PERFORMANCE_HINT is LATENCY"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 0}, "PERFORMANCE_HINT is LATENCY"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2}, "INFERENCE_NUM_THREADS is 2"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}, "PERFORMANCE_HINT is LATENCY"),
    ],
)
def test_what_needs_more_than_one_thread_of_the_cpu_is_compiled_by_each_worker_as_configured(
    target_device, plugin_config, reason
):
    plan = plan_compilation(target_device, plugin_config, 2)
    assert plan == Compilation(target_device, plugin_config, shared=False, reason=reason)


@pytest.mark.parametrize(
    ("plugin_config", "cores"),
    [
        ({"PERFORMANCE_HINT": "LATENCY"}, 1),
        ({"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}, 8),
        ({"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "1"}, 8),
    ],
)
def test_latency_with_one_thread_or_core_is_shared(plugin_config, cores):
    plan = plan_compilation("CPU", plugin_config, cores)
    assert (plan.properties, plan.shared) == (ONE_THREAD, True)


def test_the_configuration_is_left_as_it_was():
    plugin_config = {"NUM_STREAMS": 4, "CACHE_DIR": "c"}
    plan_compilation("CPU", plugin_config, 2)
    assert plugin_config == {"NUM_STREAMS": 4, "CACHE_DIR": "c"}
