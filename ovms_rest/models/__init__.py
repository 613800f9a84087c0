"""Models: found on disk, proven, compiled, inferred."""

import sys

# OpenVINO's import of its conversion tools, which serving does not need, sends usage statistics over the network from a
# process that it forks. OpenVINO does without the tools when they cannot be imported.
sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
