"""The README of pipelines: its example is the demo, its code runs, its tables are complete."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import orjson
import pytest
from service import ROOT

from ovms_rest.demo import find_digits
from ovms_rest.pipelines import libraries
from ovms_rest.pipelines.definition import _NODE_KEYS, _PIPELINE_KEYS
from ovms_rest.pipelines.python_nodes import load_file

FOLDER = ROOT / "ovms_rest" / "pipelines"  # in the checkout: the installed package has no pages
README = (FOLDER / "README.md").read_text()


def rows(section):
    """Return the first column of the tables of a section."""
    text = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)


def names(cells):
    return sorted(name for cell in cells for name in re.findall(r"`([\w.]+)`", cell))


def test_the_example_is_the_config_of_the_demo():
    (example,) = re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    demo = Path(find_digits.__file__).with_name("config.json").read_bytes()
    assert orjson.loads(example) == orjson.loads(demo)


def test_the_python_example_is_a_node(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "node.py").write_text(code)
    node = load_file("lib", tmp_path / "node.py", {"height": "2"})
    image = np.ones((1, 4, 5, 3), np.float32)
    assert node.execute({"image": image})["image"].shape == (1, 2, 5, 3)


def test_the_tables_of_keys_list_every_key():
    assert names(rows("Keys")) == sorted([*_PIPELINE_KEYS, *_NODE_KEYS])


def test_the_tables_of_shipped_nodes_list_every_library_and_param():
    params = {
        field.name
        for module in libraries.OVMS_LIBRARIES.values()
        for field in fields(importlib.import_module(module).Options)
    }
    assert names(rows("Shipped nodes")) == sorted([*libraries.OVMS_LIBRARIES, *params])


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)(.*?)\)", README))
def test_a_link_leads_to_a_file_or_a_section(link):
    file, _, section = link.partition("#")
    assert (FOLDER / file).exists()
    if section:
        assert section in re.sub(r"[^\w\n-]", "", README.lower().replace(" ", "-"))
