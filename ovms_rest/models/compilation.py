"""How a model is to be compiled: once for all workers, or by each worker for itself.

A compiled model survives a fork only when its inference runs on the calling thread and no other; with more threads
the forked worker hangs at its first inference. NUM_STREAMS=0 with one thread is such a setting (measured, OpenVINO
2026.4.1: 0 hangs in 300 forks). NUM_STREAMS=1 with one thread is another, as fast, but its synchronous inference drops
every exception and leaves the outputs of the inference before, so that a failure would look like an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PluginValue = str | int | float | bool

# Pinning would put the only thread of every worker on the same core.
_SHARED_SETTINGS: Mapping[str, PluginValue] = {
    "NUM_STREAMS": 0,
    "INFERENCE_NUM_THREADS": 1,
    "ENABLE_CPU_PINNING": False,
}
_HINT = "PERFORMANCE_HINT"
_THREADS = "INFERENCE_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Compilation:
    """The device and its properties; `shared` when the arbiter compiles for all workers; `reason` says why."""

    device: str
    properties: Mapping[str, PluginValue]
    shared: bool
    reason: str


def plan_compilation(target_device: str, plugin_config: Mapping[str, PluginValue], cores: int) -> Compilation:
    """Settle how a model with this configuration is compiled on a machine with so many usable cores."""
    hint = str(plugin_config.get(_HINT, "")).upper()
    threads = _whole_number(plugin_config.get(_THREADS, 0))
    latency = hint == "LATENCY" and threads != 1 and cores > 1
    if target_device != "CPU":
        return Compilation(target_device, plugin_config, shared=False, reason=f"target_device is {target_device}")
    if threads is None or threads > 1:
        return Compilation("CPU", plugin_config, shared=False, reason=f"{_THREADS} is {plugin_config[_THREADS]}")
    if latency:
        return Compilation("CPU", plugin_config, shared=False, reason=f"{_HINT} is LATENCY")
    replaced = {key: value for key, value in plugin_config.items() if key in (_HINT, *_SHARED_SETTINGS)}
    kept = {key: value for key, value in plugin_config.items() if key not in replaced}
    reason = "one thread in each worker"
    if replaced:
        reason += f" serve what {', '.join(f'{key}={value}' for key, value in replaced.items())} asks for"
    return Compilation("CPU", {**kept, **_SHARED_SETTINGS}, shared=True, reason=reason)


def _whole_number(value: PluginValue) -> int | None:
    """Read a number of threads; None for what OpenVINO is going to refuse."""
    try:
        return int(value)
    except ValueError:
        return None
