"""Custom nodes that end their worker when the request says so."""

from pathlib import Path

# x FP32 [-1] -> y = x. The first value says what happens: 666 reads address 0, as broken native code does; 667 gets the
# worker killed as if memory were short; 668 writes the worker's process id to the file `waiting` beside the node, and
# waits until the file `go` exists; 669 aborts.
_CODE = """
import ctypes, os, signal, time
def inputs(params): return {"x": ("FP32", [-1])}
def outputs(params): return {"y": ("FP32", [-1])}
def execute(inputs, params):
    x = inputs["x"]
    if x[0] == 666:
        ctypes.string_at(0)
    if x[0] == 667:
        os.kill(os.getpid(), signal.SIGKILL)
    if x[0] == 668:
        with open(f"{DIRECTORY}/waiting", "w") as file:
            file.write(f"{os.getpid()}\\n")
        while not os.path.exists(f"{DIRECTORY}/go"):
            time.sleep(0.01)
    if x[0] == 669:
        os.abort()
    return {"y": x.copy()}
"""
CRASH, KILL, WAIT, ABORT = 666, 667, 668, 669


def save(directory: Path, name: str = "fragile") -> dict[str, list]:
    """Write the node; return the sections of a config whose pipeline `name` runs it."""
    (directory / "fragile.py").write_text(f"DIRECTORY = {str(directory)!r}\n{_CODE}")
    node = {"name": "node", "type": "custom", "library_name": "fragile", "outputs": [{"data_item": "y", "alias": "y"}]}
    node["inputs"] = [{"x": {"node_name": "request", "data_item": "x"}}]
    outputs = [{"y": {"node_name": "node", "data_item": "y"}}]
    return {
        "custom_node_library_config_list": [{"name": "fragile", "base_path": "fragile.py"}],
        "pipeline_config_list": [{"name": name, "inputs": ["x"], "nodes": [node], "outputs": outputs}],
    }


def request(*values: float, **keys: object) -> dict:
    """Return a request for x."""
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(values)], "data": list(values)}], **keys}
