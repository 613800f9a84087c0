"""The page on traces: its tables have what the code has."""

import configparser
import re

from service import ROOT

from ovms_rest.tracing.sampling import DEFAULT, NAMES
from ovms_rest.tracing.sender import Batches
from ovms_rest.tracing.settings import INSTALL, PACKAGES
from ovms_rest.tracing.spans import InferenceTimes, NodeTimes, RequestTrace, make_spans

PAGE = (ROOT / "ovms_rest" / "tracing" / "README.md").read_text()
REQUEST = RequestTrace(
    *("1" * 32, "2" * 16, "", 1, "", 0, 1, 100, "POST", "/", "/v2/models/{name}/infer", "http", "HTTP/1.1", "h", "c"),
    *("u", "r", 500, 1, 1, '{"error":"why"}'),
    InferenceTimes("NAME", "1", "id", 1, 2, 1, 1, 4, 5, 1, 1, [tuple(NodeTimes("NAME", "m", "1", 4, 5, 1, False))]),
)


def test_page_lists_every_span_with_its_attributes():
    cells = [line.split("|") for line in PAGE.splitlines() if line.count("|") == 4]
    rows = {names[1]: last for _, first, _, last, _ in cells if (names := first.split("`"))[1:]}
    rows = {name: last for name, last in rows.items() if not name.startswith("OTEL")}
    spans = make_spans(REQUEST)
    assert list(rows) == list(dict.fromkeys(span.name for span in spans))
    for span in spans:
        ours = {name.removeprefix("ovms_rest") for name in span.attributes if name.startswith("ovms_rest.")}
        assert {name.removeprefix("ovms_rest") for name in re.findall(r"`([\w.]+)`", rows[span.name])} - {"id"} == ours


def test_page_lists_every_sampler_and_the_sizes_of_batches():
    (row,) = re.findall(r"^\| `OTEL_TRACES_SAMPLER`.*$", PAGE, re.MULTILINE)
    assert set(NAMES) <= set(re.findall(r"`(\w+)`", row))
    assert f"`{DEFAULT}` (default)" in row
    queued, size, seconds = Batches()
    assert f"{queued} spans that may be queued, {size} in a batch, {seconds * 1000:.0f} ms between batches" in PAGE


def test_extra_has_the_packages_that_are_looked_for():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extra = config["options.extras_require"]["otel"].split("\n")
    assert sorted(filter(None, extra)) == [f"{package} >=1.30, <2" for package in sorted(PACKAGES)]
    assert "[otel]" in INSTALL
    assert "pip install '.[otel]'" in PAGE
