"""The custom node libraries that OVMS ships, each as a module of `Options` and what is done with them.

    Options                     a dataclass of the node's params, which `params.parse_params` reads once, at load
    inputs(options) -> {"image": ("FP32", (1, 3, -1, -1))}    outputs(options): of the same form
    execute(arrays, options) -> {"image": array}

A dim is a size, or -1 for any. `execute` gets float32 arrays of the shapes that `inputs` tells, which the pipeline has
checked; it checks what these leave open, and raises ValueError when it cannot do its work. It never changes its arrays.
What it returns are C-contiguous arrays of its own.

They take OVMS's params and give its results (its `src/custom_nodes`), but for what a module says of itself. A param
that OVMS does not know or cannot read it ignores; here it is a mistake.
"""
