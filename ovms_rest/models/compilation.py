"""Plans of compilation: the properties, and whether a model is compiled once for all workers or in each worker.

A compiled model survives a fork only when its inference runs on the calling thread alone; with more threads the forked
worker hangs at its first inference. NUM_STREAMS=0 with one thread is such a setting (measured, OpenVINO 2026.4.1: 0
hangs in 300 forks). NUM_STREAMS=1 with one thread is another, as fast, but its synchronous inference drops exceptions
and keeps the previous outputs, so that a failure would look like a success.

A model that OpenVINO imports from its cache survives a fork too (0 hangs in 300 forks) and shares its weights just as
well, so shared models are cached like the others.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ovms_rest.errors import LoadError
from ovms_rest.protocol.words import cut, show

PluginValue = str | int | float | bool

# Pinning would put the threads of all workers on the same cores.
ONE_THREAD: Mapping[str, PluginValue] = {"NUM_STREAMS": 0, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
_HINT = "PERFORMANCE_HINT"
_THREADS = "INFERENCE_NUM_THREADS"
_STREAMS = "NUM_STREAMS"
_PINNING = "ENABLE_CPU_PINNING"
_PRECISION = "INFERENCE_PRECISION_HINT"
_CACHE = "CACHE_DIR"
_MMAP = "ENABLE_MMAP"
_OF_DEVICES = "DEVICE_PROPERTIES"

_COMPOSITES = ("AUTO", "BATCH", "HETERO", "MULTI")

# Hints that one thread in each worker cannot satisfy.
_THREADED_HINTS = ("LATENCY", "CUMULATIVE_THROUGHPUT")

# Properties that OpenVINO accepts for every device, listed or not (2026.4.1, tried on the CPU).
_OF_EVERY_DEVICE = (
    *("ALLOW_AUTO_BATCHING", "AUTO_BATCH_TIMEOUT", _CACHE, "CACHE_MODE", _OF_DEVICES, _MMAP),
    *("FORCE_TBB_TERMINATE", "LOG_LEVEL"),
)


@dataclass(frozen=True, slots=True)
class Compilation:
    """The device and its properties; whether the arbiter compiles for all workers (`shared`), and the `reason`.

    `notes` are about settings that were renamed or replaced.
    """

    device: str
    properties: Mapping[str, PluginValue]
    shared: bool
    reason: str
    notes: tuple[str, ...] = ()


def plan_compilation(
    target_device: str, plugin_config: Mapping[str, PluginValue], cores: int, cache_dir: str = ""
) -> Compilation:
    """Return the plan for a model with this configuration on a machine with this number of usable cores.

    `cache_dir` is the cache of compiled models for configurations without a CACHE_DIR. Raises LoadError for invalid
    names and values in the configuration.
    """
    device = target_device.upper() or "CPU"
    properties, notes = _normalize(plugin_config)
    if cache_dir:
        properties.setdefault(_CACHE, cache_dir)
    if _uses_cpu(device) and properties.get(_PINNING):
        notes += (f"{_PINNING}={properties[_PINNING]} is ignored: it would put all workers on the same core",)
    obstacle = _find_obstacle(device, properties, cores)
    if obstacle:
        if _uses_cpu(device):
            properties[_PINNING] = False
        if device == "CPU" and not properties.get(_THREADS):
            notes += (f"each worker may use all {cores} cores at the same time",)
        return Compilation(device, properties, shared=False, reason=obstacle, notes=notes)
    asked = ", ".join(f"{key}={properties[key]}" for key in (_HINT, _STREAMS, _THREADS) if key in properties)
    reason = "one thread in each worker" + (f" satisfies {asked}" if asked else "")
    kept = {key: value for key, value in properties.items() if key not in (_HINT, *ONE_THREAD)}
    return Compilation(device, {**kept, **ONE_THREAD}, shared=True, reason=reason, notes=notes)


def maps_files(compilation: Compilation) -> bool:
    """Return whether the user wants the files of the model mapped into memory, instead of private copies.

    OpenVINO maps them by default, and overwriting a mapped file changes or kills the service.
    """
    return bool(compilation.properties.get(_MMAP))


def check_properties(
    properties: Mapping[str, PluginValue],
    device: str,
    supported: Mapping[str, str],
    accepts: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise LoadError with every property that the device does not have or that is read-only.

    `supported` is the SUPPORTED_PROPERTIES of the device, or of all devices in a composite one: "RO", "RW" or "WO" by
    name. It is empty for an unknown device, which the compilation will report. Devices also accept properties that they
    do not list; for those `accepts` decides.
    """
    if not supported:
        return
    settable = [name for name, access in supported.items() if access != "RO"]
    known = sorted({*settable, *_OF_EVERY_DEVICE})
    problems = []
    for key in properties:
        if key in known or (key not in supported and accepts(key)):
            continue
        if key in supported:
            problems.append(f"plugin_config.{key}: is read-only on {device}")
            continue
        shown = cut(key)
        nearest = difflib.get_close_matches(shown.upper(), known, n=1, cutoff=0)
        problems.append(f"plugin_config.{shown}: {device} has no such property; the nearest is {nearest[0]}")
    if problems:
        raise LoadError("; ".join(problems))


def _uses_cpu(device: str) -> bool:
    """Return whether a device is the CPU, or a composite one that may use it."""
    composite, _, named = device.partition(":")
    return device == "CPU" or (composite in _COMPOSITES and (not named or "CPU" in named))


def _find_obstacle(device: str, properties: Mapping[str, PluginValue], cores: int) -> str | None:
    """Return the reason why one CPU thread in each worker cannot satisfy the configuration, None if it can."""
    threads = properties.get(_THREADS, 0)
    if device != "CPU":
        return f"target_device is {device}"
    if _OF_DEVICES in properties:  # may contain any property
        return f"{_OF_DEVICES} is given"
    if threads not in (0, 1):
        return f"{_THREADS} is {threads}"
    if properties.get(_HINT) in _THREADED_HINTS and threads != 1 and cores > 1:
        return f"{_HINT} is {properties[_HINT]}"
    return None


# --- Names and values


def _normalize(plugin_config: Mapping[str, PluginValue]) -> tuple[dict[str, PluginValue], tuple[str, ...]]:
    """Return the properties under OpenVINO's current names and types, with a note for each that was renamed.

    Raises LoadError with all problems.
    """
    properties: dict[str, PluginValue] = {}
    givers: dict[str, str] = {}
    notes, problems = [], []
    for key, given in plugin_config.items():
        meant, value = _RENAMED_VALUES.get((key, str(given).upper()), (key, given))
        name = _RENAMED.get(meant, meant)
        if name in givers:
            problems.append(f"plugin_config.{key}: sets {name} again, after {givers[name]}")
            continue
        givers[name] = key
        try:
            properties[name] = _READERS[meant](value) if meant in _READERS else value
        except ValueError as expected:
            problems.append(f"plugin_config.{key}: expected {expected}, got {show(given)}")
            continue
        if name != key:
            notes.append(f"{key}={given} is read as {name}={properties[name]}")
    if problems:
        raise LoadError("; ".join(problems))
    return properties, tuple(notes)


# A reader returns OpenVINO's value for one in a config, or raises ValueError with the expectation.


def _read_count(value: PluginValue) -> int:
    text = str(value).removesuffix(".0")
    if not text.isdecimal() or len(text) > _DIGITS:
        raise ValueError("an integer of at least 0")
    return int(text)


def _read_streams(value: PluginValue) -> PluginValue:
    text = str(value).upper()
    if text in ("AUTO", "NUMA"):
        return text
    # -1 and -2 are OpenVINO's numbers for AUTO and NUMA.
    if text not in ("-1", "-2") and not text.removesuffix(".0").isdecimal():
        raise ValueError("AUTO, NUMA or an integer of at least 0")
    return value


def _read_word(words: Mapping[str, PluginValue]) -> Callable[[PluginValue], PluginValue]:
    """Return a reader of words in any case."""

    def read(value: PluginValue) -> PluginValue:
        word = str(value).upper()
        if word not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return words[word]

    return read


# OpenVINO refuses numbers with more digits.
_DIGITS = 18

# Names that OpenVINO dropped, most of them in 2024.0 and AFFINITY later, and the properties that replaced them.
_RENAMED = {
    "CPU_THROUGHPUT_STREAMS": _STREAMS,
    "GPU_THROUGHPUT_STREAMS": _STREAMS,
    "CPU_THREADS_NUM": _THREADS,
    "CPU_BIND_THREAD": _PINNING,
    "AFFINITY": _PINNING,
    "ENFORCE_BF16": _PRECISION,
}
# Values of dropped names that stand for another property, or for a value of another name.
_RENAMED_VALUES: Mapping[tuple[str, str], tuple[str, PluginValue]] = {
    ("CPU_THROUGHPUT_STREAMS", "CPU_THROUGHPUT_AUTO"): (_HINT, "THROUGHPUT"),
    ("GPU_THROUGHPUT_STREAMS", "GPU_THROUGHPUT_AUTO"): (_HINT, "THROUGHPUT"),
    ("CPU_THROUGHPUT_STREAMS", "CPU_THROUGHPUT_NUMA"): (_STREAMS, "NUMA"),
}

_FLAGS = {"YES": True, "NO": False, "TRUE": True, "FALSE": False, "1": True, "0": False}
_READERS: Mapping[str, Callable[[PluginValue], PluginValue]] = {
    _THREADS: _read_count,
    "CPU_THREADS_NUM": _read_count,
    "AUTO_BATCH_TIMEOUT": _read_count,
    "PERFORMANCE_HINT_NUM_REQUESTS": _read_count,
    _STREAMS: _read_streams,
    "CPU_THROUGHPUT_STREAMS": _read_streams,
    "GPU_THROUGHPUT_STREAMS": _read_streams,
    _HINT: _read_word({hint: hint for hint in ("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT")}),
    # Threads that are bound to a NUMA node are not pinned to a core.
    "CPU_BIND_THREAD": _read_word(_FLAGS | {"HYBRID_AWARE": True, "NUMA": False}),
    "AFFINITY": _read_word({"CORE": True, "HYBRID_AWARE": True, "NUMA": False, "NONE": False}),
    "ENFORCE_BF16": _read_word({word: "bf16" if flag else "f32" for word, flag in _FLAGS.items()}),
    **dict.fromkeys(
        (
            *("ALLOW_AUTO_BATCHING", "CPU_DENORMALS_OPTIMIZATION", "DEVICE_BIND_BUFFER", _PINNING),
            *("ENABLE_CPU_RESERVATION", "ENABLE_HYPER_THREADING", _MMAP, "ENABLE_RUNTIME_FALLBACK"),
            *("ENABLE_STARTUP_FALLBACK", "ENABLE_TENSOR_PARALLEL", "ENABLE_WEIGHTLESS", "FORCE_TBB_TERMINATE"),
            "PERF_COUNT",
        ),
        _read_word(_FLAGS),
    ),
}
