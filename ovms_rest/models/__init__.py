"""Models: found on disk, proven, compiled, inferred."""

import os
import sys

# OpenVINO's import of its conversion tools, which serving does not need, sends usage statistics over the network from a
# process that it forks. OpenVINO does without the tools when they cannot be imported.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]

# TBB, in which OpenVINO infers, binds the thread to the cores that it may use anyway before each inference and after
# it: three system calls and as much again of hwloc's, 3 of 8 us of a small inference. Told that the topology is not
# this machine's, hwloc does not bind (its documentation, "Environment Variables").
os.environ.setdefault("HWLOC_THISSYSTEM", "0")
