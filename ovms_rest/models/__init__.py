"""Models: found on disk, tried, compiled, inferred."""

import os
import sys

# The import of OpenVINO's conversion tools, which serving does not need, sends usage statistics over the network from a
# forked process. OpenVINO works without the tools if they cannot be imported.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]

# Before and after each inference TBB binds the thread to the cores that it may use anyway: three system calls, and as
# much time again in hwloc, together 3 of 8 us of a small inference. With this setting hwloc assumes the topology of
# another machine and does not bind (hwloc's documentation, "Environment Variables").
os.environ.setdefault("HWLOC_THISSYSTEM", "0")
