"""What a config file has that OVMS dropped or calls legacy, and what becomes of it here; for `ovms-rest check`.

OVMS 2026.3 removed TensorFlow Serving's API (its pull request 4349) and stateful models (4271), after which one of
their keys refuses the whole file. Its page on legacy features (docs/legacy.md) has pipelines. A key that does not work
here either is a mistake of the file, which `config` reports.
"""

from collections.abc import Iterator
from typing import Any


def describe_dropped(root: dict[str, Any]) -> Iterator[str]:
    """Return a line for each feature that a valid config uses, or its clients may."""
    models = [item["config"] for item in root["model_config_list"]]
    places = (
        f"model_config_list[{index}].config.stateful" for index, model in enumerate(models) if "stateful" in model
    )
    stateful = list(places)
    if stateful:
        more = f" and {len(stateful) - 1} more" if stateful[1:] else ""
        yield (
            f"{stateful[0]}{more}: needs OVMS before 2026.3, since later releases refuse the whole file; works here: "
            "false has no effect"
        )
    pipelines = root.get("pipeline_config_list", [])
    if pipelines:
        yield "pipeline_config_list: a legacy feature of OVMS; works here, with libraries in C as for OVMS"
    if models or pipelines:
        yield (
            "clients of TensorFlow Serving's REST API: need OVMS before 2026.3; work here: POST /v1/models/NAME:predict"
        )
