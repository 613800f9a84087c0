"""Plans of compilation by configuration and cores, and checks of a device's properties."""

import re

import model_zoo
import openvino
import orjson
import pytest

from ovms_rest.errors import LoadError
from ovms_rest.models.compilation import Compilation, check_properties, plan_compilation

ONE_THREAD = {"NUM_STREAMS": 0, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
PLAIN = "one thread in each worker"
PINNING_NOTE = "ENABLE_CPU_PINNING=True is ignored: it would put all workers on the same core"


# --- Shared or not


@pytest.mark.parametrize("cores", [1, 2, 64])
@pytest.mark.parametrize("target_device", ["CPU", "cpu", ""])
def test_model_without_plugin_config_is_shared(target_device, cores):
    assert plan_compilation(target_device, {}, cores) == Compilation("CPU", ONE_THREAD, shared=True, reason=PLAIN)


@pytest.mark.parametrize(
    ("plugin_config", "satisfied"),
    [
        ({"PERFORMANCE_HINT": "THROUGHPUT"}, "PERFORMANCE_HINT=THROUGHPUT"),
        ({"PERFORMANCE_HINT": "throughput"}, "PERFORMANCE_HINT=THROUGHPUT"),
        ({"NUM_STREAMS": 4}, "NUM_STREAMS=4"),
        ({"NUM_STREAMS": "AUTO"}, "NUM_STREAMS=AUTO"),
        ({"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}, None),
        ({"INFERENCE_NUM_THREADS": 0}, None),
        ({"INFERENCE_NUM_THREADS": "1"}, "INFERENCE_NUM_THREADS=1"),
        ({"INFERENCE_NUM_THREADS": 1.0}, None),
        ({"ENABLE_CPU_PINNING": True}, ""),
        ({"ENABLE_CPU_PINNING": "YES"}, ""),
        ({"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "8"}, "PERFORMANCE_HINT=THROUGHPUT, NUM_STREAMS=8"),
    ],
)
def test_model_that_one_thread_per_worker_satisfies_is_shared(plugin_config, satisfied):
    plan = plan_compilation("CPU", plugin_config, 2)
    assert (plan.device, plan.properties, plan.shared) == ("CPU", ONE_THREAD, True)
    assert satisfied is None or plan.reason == (f"{PLAIN} satisfies {satisfied}" if satisfied else PLAIN)


@pytest.mark.parametrize(("value", "notes"), [("YES", (PINNING_NOTE,)), ("NO", ())])
def test_pinning_is_ignored_with_a_note(value, notes):
    assert plan_compilation("CPU", {"ENABLE_CPU_PINNING": value}, 2).notes == notes


def test_reason_omits_properties_that_are_kept():
    assert plan_compilation("CPU", {"INFERENCE_PRECISION_HINT": "f32"}, 2).reason == PLAIN


def test_properties_unrelated_to_threads_are_kept():
    kept = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": "/srv/cache", "LOG_LEVEL": "LOG_NONE"}
    plan = plan_compilation("CPU", kept | {"NUM_STREAMS": 2}, 2)
    assert plan == Compilation("CPU", kept | ONE_THREAD, shared=True, reason=f"{PLAIN} satisfies NUM_STREAMS=2")


@pytest.mark.parametrize(
    ("target_device", "plugin_config", "reason"),
    [
        ("GPU", {}, "target_device is GPU"),
        ("GPU.1", {"NUM_STREAMS": 2}, "target_device is GPU.1"),
        ("NPU", {}, "target_device is NPU"),
        ("AUTO", {"PERFORMANCE_HINT": "LATENCY"}, "target_device is AUTO"),
        ("AUTO:GPU,CPU", {"PERFORMANCE_HINT": "CUMULATIVE_THROUGHPUT"}, "target_device is AUTO:GPU,CPU"),
        ("HETERO:GPU,CPU", {"INFERENCE_NUM_THREADS": 1}, "target_device is HETERO:GPU,CPU"),
        ("MULTI:CPU", {}, "target_device is MULTI:CPU"),
        ("BATCH:CPU(4)", {"AUTO_BATCH_TIMEOUT": 10}, "target_device is BATCH:CPU(4)"),
        ("CPU", {"INFERENCE_NUM_THREADS": 2}, "INFERENCE_NUM_THREADS is 2"),
        ("CPU", {"INFERENCE_NUM_THREADS": 4, "NUM_STREAMS": 2}, "INFERENCE_NUM_THREADS is 4"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY"}, "PERFORMANCE_HINT is LATENCY"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 0}, "PERFORMANCE_HINT is LATENCY"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2}, "INFERENCE_NUM_THREADS is 2"),
        ("CPU", {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}, "PERFORMANCE_HINT is LATENCY"),
        ("CPU", {"PERFORMANCE_HINT": "CUMULATIVE_THROUGHPUT"}, "PERFORMANCE_HINT is CUMULATIVE_THROUGHPUT"),
    ],
)
def test_model_that_needs_several_threads_is_compiled_by_each_worker_as_configured(
    target_device, plugin_config, reason
):
    plan = plan_compilation(target_device, plugin_config, 2)
    pinning = {} if target_device.startswith(("GPU", "NPU")) else {"ENABLE_CPU_PINNING": False}
    threads = target_device == "CPU" and not plugin_config.get("INFERENCE_NUM_THREADS")
    notes = ("each worker may use all 2 cores at the same time",) if threads else ()
    assert plan == Compilation(target_device, plugin_config | pinning, shared=False, reason=reason, notes=notes)


@pytest.mark.parametrize("target_device", ["CPU", "AUTO", "HETERO:GPU,CPU", "BATCH:CPU(4)"])
@pytest.mark.parametrize("asked", [{"ENABLE_CPU_PINNING": "YES"}, {"AFFINITY": "CORE"}])
def test_workers_that_compile_for_themselves_are_not_pinned_to_the_same_cores(target_device, asked):
    plan = plan_compilation(target_device, {"INFERENCE_NUM_THREADS": 2, **asked}, 4)
    assert plan.properties["ENABLE_CPU_PINNING"] is False
    assert PINNING_NOTE in plan.notes


def test_device_properties_are_passed_on_and_prevent_sharing():
    given = {"DEVICE_PROPERTIES": "{CPU:{NUM_STREAMS:2}}"}
    plan = plan_compilation("CPU", given, 2)
    assert (plan.shared, plan.reason) == (False, "DEVICE_PROPERTIES is given")
    check_properties(plan.properties, "CPU", {"NUM_STREAMS": "RW", "ENABLE_CPU_PINNING": "RW"})


@pytest.mark.parametrize(
    ("target_device", "device"),
    [("cpu", "CPU"), ("gpu.1", "GPU.1"), ("Hetero:gpu,Cpu", "HETERO:GPU,CPU"), ("batch:cpu(4)", "BATCH:CPU(4)")],
)
def test_devices_are_converted_to_upper_case(target_device, device):
    assert plan_compilation(target_device, {}, 2).device == device


@pytest.mark.parametrize(
    ("plugin_config", "cores"),
    [
        ({"PERFORMANCE_HINT": "LATENCY"}, 1),
        ({"PERFORMANCE_HINT": "CUMULATIVE_THROUGHPUT"}, 1),
        ({"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}, 8),
        ({"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "1"}, 8),
    ],
)
def test_hint_for_threads_is_shared_with_only_one_thread_or_core(plugin_config, cores):
    plan = plan_compilation("CPU", plugin_config, cores)
    assert (plan.properties, plan.shared) == (ONE_THREAD, True)


def test_configuration_is_not_modified():
    plugin_config = {"NUM_STREAMS": 4, "ENFORCE_BF16": "NO"}
    plan_compilation("CPU", plugin_config, 2, "/srv/cache")
    assert plugin_config == {"NUM_STREAMS": 4, "ENFORCE_BF16": "NO"}


def test_plan_survives_json():
    plan = plan_compilation("CPU", {"CPU_THREADS_NUM": "2", "PERF_COUNT": "YES"}, 2, "/srv/cache")
    travelled = Compilation(**orjson.loads(orjson.dumps(plan)))
    assert (travelled.device, travelled.properties, travelled.shared) == (plan.device, plan.properties, plan.shared)


# --- The cache


@pytest.mark.parametrize(
    ("target_device", "plugin_config"), [("CPU", {}), ("CPU", {"PERFORMANCE_HINT": "LATENCY"}), ("GPU", {})]
)
def test_models_are_cached_in_the_directory_of_the_service(target_device, plugin_config):
    assert plan_compilation(target_device, plugin_config, 2, "/srv/cache").properties["CACHE_DIR"] == "/srv/cache"


@pytest.mark.parametrize("own", ["/srv/own", ""])
def test_cache_of_a_model_has_precedence(own):
    assert plan_compilation("CPU", {"CACHE_DIR": own}, 2, "/srv/cache").properties["CACHE_DIR"] == own


def test_nothing_is_cached_without_a_directory():
    assert "CACHE_DIR" not in plan_compilation("CPU", {}, 2).properties


# --- Names


@pytest.mark.parametrize(
    ("given", "properties"),
    [
        ({"CPU_THROUGHPUT_STREAMS": "4"}, {"NUM_STREAMS": "4"}),
        ({"CPU_THROUGHPUT_STREAMS": 4}, {"NUM_STREAMS": 4}),
        ({"CPU_THROUGHPUT_STREAMS": "CPU_THROUGHPUT_AUTO"}, {"PERFORMANCE_HINT": "THROUGHPUT"}),
        ({"CPU_THROUGHPUT_STREAMS": "CPU_THROUGHPUT_NUMA"}, {"NUM_STREAMS": "NUMA"}),
        ({"GPU_THROUGHPUT_STREAMS": "2"}, {"NUM_STREAMS": "2"}),
        ({"GPU_THROUGHPUT_STREAMS": "GPU_THROUGHPUT_AUTO"}, {"PERFORMANCE_HINT": "THROUGHPUT"}),
        ({"CPU_THREADS_NUM": "8"}, {"INFERENCE_NUM_THREADS": 8}),
        ({"CPU_BIND_THREAD": "YES"}, {"ENABLE_CPU_PINNING": True}),
        ({"CPU_BIND_THREAD": "NO"}, {"ENABLE_CPU_PINNING": False}),
        ({"CPU_BIND_THREAD": "NUMA"}, {"ENABLE_CPU_PINNING": False}),
        ({"CPU_BIND_THREAD": "HYBRID_AWARE"}, {"ENABLE_CPU_PINNING": True}),
        ({"AFFINITY": "CORE"}, {"ENABLE_CPU_PINNING": True}),
        ({"AFFINITY": "HYBRID_AWARE"}, {"ENABLE_CPU_PINNING": True}),
        ({"AFFINITY": "NUMA"}, {"ENABLE_CPU_PINNING": False}),
        ({"AFFINITY": "NONE"}, {"ENABLE_CPU_PINNING": False}),
        ({"ENFORCE_BF16": "YES"}, {"INFERENCE_PRECISION_HINT": "bf16"}),
        ({"ENFORCE_BF16": "no"}, {"INFERENCE_PRECISION_HINT": "f32"}),
        ({"PERFORMANCE_HINT_NUM_REQUESTS": 2}, {"PERFORMANCE_HINT_NUM_REQUESTS": 2}),
    ],
)
def test_dropped_names_are_replaced_by_current_ones(given, properties):
    assert plan_compilation("GPU", given, 2).properties == properties


def test_dropped_names_decide_whether_a_model_is_shared():
    assert plan_compilation("CPU", {"CPU_THREADS_NUM": "4"}, 8).reason == "INFERENCE_NUM_THREADS is 4"


@pytest.mark.parametrize(
    ("plugin_config", "notes"),
    [
        ({"CPU_THREADS_NUM": "8"}, ("CPU_THREADS_NUM=8 is read as INFERENCE_NUM_THREADS=8",)),
        (
            {"CPU_THROUGHPUT_STREAMS": "CPU_THROUGHPUT_AUTO", "AFFINITY": "NONE"},
            (
                "CPU_THROUGHPUT_STREAMS=CPU_THROUGHPUT_AUTO is read as PERFORMANCE_HINT=THROUGHPUT",
                "AFFINITY=NONE is read as ENABLE_CPU_PINNING=False",
            ),
        ),
        ({"INFERENCE_NUM_THREADS": "8"}, ()),
    ],
)
def test_notes_list_dropped_names(plugin_config, notes):
    assert plan_compilation("CPU", plugin_config, 2).notes == notes


@pytest.mark.parametrize(
    ("plugin_config", "name"),
    [
        ({"NUM_STREAMS": 2, "CPU_THROUGHPUT_STREAMS": 4}, "NUM_STREAMS"),
        ({"CPU_THREADS_NUM": 2, "INFERENCE_NUM_THREADS": 2}, "INFERENCE_NUM_THREADS"),
        ({"PERFORMANCE_HINT": "LATENCY", "GPU_THROUGHPUT_STREAMS": "GPU_THROUGHPUT_AUTO"}, "PERFORMANCE_HINT"),
        ({"CPU_BIND_THREAD": "NO", "AFFINITY": "NONE"}, "ENABLE_CPU_PINNING"),
    ],
)
def test_property_with_two_names_is_refused(plugin_config, name):
    first, second = plugin_config
    with pytest.raises(LoadError, match=f"^plugin_config.{second}: sets {name} again, after {first}$"):
        plan_compilation("CPU", plugin_config, 2)


# --- Values


@pytest.mark.parametrize("key", ["INFERENCE_NUM_THREADS", "AUTO_BATCH_TIMEOUT", "PERFORMANCE_HINT_NUM_REQUESTS"])
@pytest.mark.parametrize("given", ["3", 3, 3.0, "03"])
def test_integers_may_be_given_as_text(key, given):
    value = plan_compilation("GPU", {key: given}, 2).properties[key]
    assert (type(value), value) == (int, 3)


@pytest.mark.parametrize("key", ["ENABLE_CPU_PINNING", "PERF_COUNT", "ENABLE_MMAP"])
@pytest.mark.parametrize(("yes", "no"), [("YES", "NO"), ("TRUE", "FALSE"), ("true", "no"), ("1", "0"), (1, 0)])
def test_booleans_may_be_given_as_text_or_number(key, yes, no):
    assert plan_compilation("GPU", {key: yes}, 2).properties[key] is True
    assert plan_compilation("GPU", {key: no}, 2).properties[key] is False


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        *(("NUM_STREAMS", given, given) for given in ("AUTO", "NUMA", "4", 4, 0, -1, "-2")),
        ("NUM_STREAMS", "auto", "AUTO"),
        ("PERFORMANCE_HINT", "latency", "LATENCY"),
    ],
)
def test_streams_and_hints_are_passed_on_in_upper_case(key, given, value):
    assert plan_compilation("GPU", {key: given}, 2).properties[key] == value


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("INFERENCE_NUM_THREADS", "many", 'expected an integer of at least 0, got "many"'),
        ("INFERENCE_NUM_THREADS", "", 'expected an integer of at least 0, got ""'),
        ("INFERENCE_NUM_THREADS", -1, "expected an integer of at least 0, got -1"),
        ("INFERENCE_NUM_THREADS", 1.5, "expected an integer of at least 0, got 1.5"),
        ("INFERENCE_NUM_THREADS", True, "expected an integer of at least 0, got true"),
        ("INFERENCE_NUM_THREADS", "9" * 5000, f'expected an integer of at least 0, got "{"9" * 59}...'),
        ("CPU_THREADS_NUM", "many", 'expected an integer of at least 0, got "many"'),
        ("AUTO_BATCH_TIMEOUT", "soon", 'expected an integer of at least 0, got "soon"'),
        ("NUM_STREAMS", "x", 'expected AUTO, NUMA or an integer of at least 0, got "x"'),
        ("NUM_STREAMS", -3, "expected AUTO, NUMA or an integer of at least 0, got -3"),
        ("CPU_THROUGHPUT_STREAMS", "some", 'expected AUTO, NUMA or an integer of at least 0, got "some"'),
        ("PERF_COUNT", "maybe", 'expected one of YES, NO, TRUE, FALSE, 1, 0, got "maybe"'),
        ("PERFORMANCE_HINT", "FAST", 'expected one of LATENCY, THROUGHPUT, CUMULATIVE_THROUGHPUT, got "FAST"'),
        ("PERFORMANCE_HINT", "", 'expected one of LATENCY, THROUGHPUT, CUMULATIVE_THROUGHPUT, got ""'),
        ("AFFINITY", "YES", 'expected one of CORE, HYBRID_AWARE, NUMA, NONE, got "YES"'),
    ],
)
def test_invalid_value_is_refused(key, given, message):
    with pytest.raises(LoadError, match=f"^{re.escape(f'plugin_config.{key}: {message}')}$"):
        plan_compilation("CPU", {key: given}, 2)


def test_all_problems_are_reported_together():
    plugin_config = {"INFERENCE_NUM_THREADS": "many", "CPU_THREADS_NUM": 1, "PERF_COUNT": "maybe"}
    with pytest.raises(LoadError) as caught:
        plan_compilation("CPU", plugin_config, 2)
    assert re.findall(r"plugin_config\.(\w+)", str(caught.value)) == list(plugin_config)


# --- Properties of a device


@pytest.fixture(scope="module")
def core():
    return openvino.Core()


@pytest.fixture(scope="module")
def cpu(core):
    return core.get_property("CPU", "SUPPORTED_PROPERTIES")


KNOWN = {"NUM_STREAMS": "RW", "PERF_COUNT": "RW", "WEIGHTS_PATH": "WO", "FULL_DEVICE_NAME": "RO"}


@pytest.mark.parametrize("key", ["NUM_STREAMS", "PERF_COUNT", "WEIGHTS_PATH"])
def test_settable_property_is_accepted(key):
    check_properties({key: 1}, "CPU", KNOWN)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("NUM_STREAM", "plugin_config.NUM_STREAM: CPU has no such property; the nearest is NUM_STREAMS"),
        ("num_streams", "plugin_config.num_streams: CPU has no such property; the nearest is NUM_STREAMS"),
        ("PERFCOUNT", "plugin_config.PERFCOUNT: CPU has no such property; the nearest is PERF_COUNT"),
        ("FULL_DEVICE_NAME", "plugin_config.FULL_DEVICE_NAME: is read-only on CPU"),
    ],
)
def test_unknown_or_read_only_property_is_refused(key, message):
    with pytest.raises(LoadError, match=f"^{re.escape(message)}$"):
        check_properties({key: 1}, "CPU", KNOWN)


def test_suggestion_for_an_unknown_name_is_settable():
    with pytest.raises(LoadError) as caught:
        check_properties({"FULL_DEVICE_NAM": 1}, "CPU", KNOWN)
    assert "the nearest is FULL_DEVICE_NAME" not in str(caught.value)


def test_all_refused_properties_are_reported_together():
    with pytest.raises(LoadError) as caught:
        check_properties({"NUM_STREAM": 1, "PERF_COUNT": 1, "FULL_DEVICE_NAME": 1, "X": 1}, "CPU", KNOWN)
    assert re.findall(r"plugin_config\.(\w+)", str(caught.value)) == ["NUM_STREAM", "FULL_DEVICE_NAME", "X"]


def test_unknown_device_is_left_to_the_compilation():
    check_properties({"NO_SUCH_KEY": 1}, "XPU", {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("ALLOW_AUTO_BATCHING", True),
            ("AUTO_BATCH_TIMEOUT", 10),
            ("CACHE_DIR", ""),
            ("CACHE_MODE", "OPTIMIZE_SPEED"),
        ),
        *(("ENABLE_MMAP", False), ("FORCE_TBB_TERMINATE", False), ("LOG_LEVEL", "LOG_NONE")),
    ],
)
@pytest.mark.parametrize("device", ["GPU", "CPU"])
def test_properties_of_openvino_itself_are_accepted_for_every_device(core, device, key, value):
    check_properties({key: value}, device, {"NUM_STREAMS": "RW"})
    if device == "CPU":
        assert core.compile_model(model_zoo.relu(), "CPU", {**ONE_THREAD, key: value}).inputs


def test_cpu_has_the_settings_of_shared_models(cpu):
    check_properties(plan_compilation("CPU", {}, 2, "/srv/cache").properties, "CPU", cpu)


@pytest.mark.parametrize("key", ["SUPPORTED_PROPERTIES", "AVAILABLE_DEVICES", "FULL_DEVICE_NAME"])
def test_read_only_property_of_the_cpu_is_refused(cpu, key):
    with pytest.raises(LoadError, match="is read-only on CPU"):
        check_properties({key: "x"}, "CPU", cpu)


@pytest.mark.parametrize(
    "plugin_config",
    [
        {"CPU_THROUGHPUT_STREAMS": "CPU_THROUGHPUT_AUTO", "AFFINITY": "NONE", "ENFORCE_BF16": "NO"},
        {"CPU_THREADS_NUM": "2", "CPU_BIND_THREAD": "NO", "CPU_THROUGHPUT_STREAMS": "2"},
    ],
)
def test_cpu_compiles_with_replaced_names(core, cpu, plugin_config):
    plan = plan_compilation("CPU", plugin_config, 2)
    check_properties(plan.properties, plan.device, cpu)
    assert core.compile_model(model_zoo.relu(), plan.device, plan.properties).inputs


def test_every_boolean_of_the_cpu_may_be_given_as_a_number(core, cpu):
    """OpenVINO itself refuses 0 and 1 for a boolean."""
    settable = [key for key, access in cpu.items() if access == "RW"]
    switches = [key for key in settable if isinstance(core.get_property("CPU", key), bool)]
    assert "PERF_COUNT" in switches
    properties = plan_compilation("GPU", dict.fromkeys(switches, 0), 2).properties
    assert all(properties[key] is False for key in switches)
