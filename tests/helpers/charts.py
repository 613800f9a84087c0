"""The Helm chart of deploy/kubernetes, rendered by Helm's own Go code (PyPI package helm-python-sdk).

`python tests/helpers/charts.py` writes deploy/kubernetes/manifests, which are the chart with its default values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from service import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"
MANIFESTS = KUBERNETES / "manifests"
RELEASE = "ovms-rest"


def render(values: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the text of each template by its file name, those that render to nothing left out."""
    import helm_python  # not on every platform, and large

    with helm_python.Chart.load(str(CHART)) as chart:
        rendered = chart.render(dict(values or {}), name=RELEASE, namespace="default")
    return {Path(name).name: f"{text.strip()}\n" for name, text in rendered.items() if text.strip()}


def objects(values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the rendered objects by kind."""
    texts = [text for name, text in render(values).items() if name != "NOTES.txt"]
    return {found["kind"]: found for text in texts for found in yaml.safe_load_all(text)}


def plain_manifests() -> dict[str, str]:
    """Return what the files of MANIFESTS have to contain, by name."""
    head = "# Rendered from chart/templates/{}, with the default values and the release name {}.\n"
    return {name: head.format(name, RELEASE) + text for name, text in render().items() if name != "NOTES.txt"}


if __name__ == "__main__":
    for name, text in plain_manifests().items():
        (MANIFESTS / name).write_text(text)
