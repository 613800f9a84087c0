"""The custom node libraries that OVMS ships, each as a module of `inputs`, `outputs` and `execute`.

    inputs(params) -> {"image": ("FP32", (1, 3, -1, -1))}    outputs(params): of the same form
    execute(arrays, params) -> {"image": array}

A dim is a size, or -1 for any. The params are the texts of the configuration; all three raise ValueError when one of
them cannot be, and `execute` also when its arrays do not fit or it cannot do its work. It never changes its arrays.
What it returns are C-contiguous arrays of its own.

They take OVMS's params and give its results (its `src/custom_nodes`), but for what a module says of itself. A param
that OVMS does not know or cannot read it ignores; here it is a mistake.
"""
