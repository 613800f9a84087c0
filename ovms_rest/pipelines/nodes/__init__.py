"""The custom nodes that OVMS ships, each as a module.

    Options                     a dataclass of the node's params, which `params.parse_params` reads once, at load
    inputs(options) -> {"image": ("FP32", (1, 3, -1, -1))}    outputs(options): of the same form
    execute(arrays, options) -> {"image": array}

A dim is a size, or -1 for any. `execute` gets float32 arrays whose shapes the pipeline has checked against `inputs`; it
checks everything else and raises ValueError with a text for the client. It never changes its arrays, and returns new
C-contiguous ones.

Params and results are those of OVMS (its `src/custom_nodes`), except where a module notes a difference. OVMS ignores a
param that it does not know or cannot read; here it is an error.
"""
