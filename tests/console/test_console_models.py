"""The console's view of models in a browser: what it shows of each, and the buttons that change the service."""

import json
import re

import model_zoo
import pytest
from browser import PHONE, needs_chromium, open_page, screenshot
from service import ROOT, serve, write_config

DEMO = ROOT / "ovms_rest" / "demo"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The demo, a model with a hostile name, one of two versions, one that cannot be read, and two to change."""
    needs_chromium()
    directory = tmp_path_factory.mktemp("zoo")
    config = json.loads((DEMO / "config.json").read_text())
    for model in config["model_config_list"]:
        model["config"]["base_path"] = str(DEMO / model["config"]["base_path"])
    for library in config["custom_node_library_config_list"]:
        library["base_path"] = str(DEMO / library["base_path"])
    for pipeline in config["pipeline_config_list"]:
        pipeline.pop("example", None)
    for version in (1, 2):
        model_zoo.save(model_zoo.relu((-1, version)), directory / "two", version)
    model_zoo.save(model_zoo.relu(), directory / "relu")
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    (directory / "empty").mkdir()
    every = {"all": {}}
    config["model_config_list"] += [
        {"config": {"name": HOSTILE, "base_path": "relu"}},
        {"config": {"name": "two", "base_path": "two", "model_version_policy": every, "layout": "NC"}},
        {"config": {"name": "broken", "base_path": "broken"}},
        {"config": {"name": "empty", "base_path": "empty"}},
        {"config": {"name": "changed", "base_path": "relu"}},
    ]
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    environ = {"OVMS_REST_MODEL_CONTROL": "local", "OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0"}
    with serve(directory, "-w", "1", config=path, **environ) as running:
        running.wait_for_workers(1)
        running.directory = directory
        yield running


@pytest.fixture
def url(zoo):
    return f"http://127.0.0.1:{zoo.port}/console"


def card(page, name):
    """Return the card of a model, once it is shown."""
    found = page.locator("article").filter(has=page.locator("h2", has_text=re.compile(f"^{re.escape(name)}$")))
    found.wait_for()
    return found


def cells(section):
    """Return the texts of a table's rows."""
    return [[cell.inner_text() for cell in row.locator("th, td").all()] for row in section.locator("tbody tr").all()]


def test_every_model_is_shown_with_its_versions_and_states(browser, zoo, url):
    with open_page(browser, url) as page:
        card(page, "digits")
        cards = page.locator("article").all()
        shown = {each.locator("h2").inner_text(): each.locator(".chip").all_inner_texts() for each in cards}
    assert {name: len(chips) for name, chips in shown.items()} == {
        name: len(entry["model_version_status"]) for name, entry in zoo.get("/v1/config").json().items()
    }
    assert shown["two"] == ["version 1 serves", "version 2 serves"]
    assert shown["broken"] == ["version 1 does not serve"]


def test_model_that_does_not_serve_shows_why(browser, zoo, url):
    with open_page(browser, url) as page:
        for name in ("broken", "empty"):
            (status,) = zoo.get("/v1/config").json()[name]["model_version_status"]
            reason = card(page, name).locator(".reason").inner_text()
            assert reason == status["status"]["error_message"] != "OK"
            assert card(page, name).get_by_role("link").count() == 0
        assert "cannot read" in card(page, "broken").inner_text()


def test_tensors_labels_and_compilation_are_shown(browser, zoo, url):
    with open_page(browser, url) as page:
        digits = card(page, "digits")
        assert cells(digits.get_by_role("region", name="Inputs")) == [
            ["image\ntakes encoded images (GRAY, of 8\u00d78)", "FP32", "[-1, 8, 8, 1]"]
        ]
        outputs = digits.get_by_role("region", name="Outputs")
        assert [row[:3] for row in cells(outputs)] == [
            ["digit", "INT64", "[-1]"],
            ["probabilities", "FP32", "[-1, 10]"],
        ]
        labels = outputs.locator("details.labels").last
        assert labels.inner_text() == "10 labels"
        labels.locator("summary").click()
        assert labels.inner_text().split("\n")[-1] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
        described = zoo.get("/v2/openapi.json").json()["paths"]["/v2/models/digits/infer"]["post"]["x-ovms-rest"]
        properties = digits.get_by_role("region", name="Compiled with").locator("dl > div")
        shown = {pair.locator("dt").inner_text(): pair.locator("dd").inner_text() for pair in properties.all()}
        assert shown == described["compiled"]
        assert shown["target_device"] == "CPU"
        two = card(page, "two").get_by_role("region", name="Inputs").first
        assert cells(two) == [["x", "FP32", "[-1, 2]", "NC"]]


def test_nodes_of_a_pipeline_are_shown(browser, url):
    with open_page(browser, url) as page:
        number = card(page, "number")
        assert number.get_attribute("aria-label") == "pipeline number"
        nodes = cells(number.get_by_role("region", name="Nodes"))
        assert [node[0] for node in nodes] == ["find", "classify"]
        assert nodes[1][2] == "digits"


def test_each_version_has_its_own_shapes(browser, url):
    with open_page(browser, url) as page:
        two = card(page, "two")
        newer, older = two.locator("details.tensors").all()
        assert newer.locator("summary").first.inner_text() == "version 2: 1 input, 1 output"
        assert cells(newer.get_by_role("region", name="Inputs"))[0][2] == "[-1, 2]"
        older.locator("summary").click()
        assert cells(older.get_by_role("region", name="Inputs"))[0][2] == "[-1, 1]"


def test_hostile_name_is_shown_as_text(browser, url):
    with open_page(browser, url) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
        shown = card(page, HOSTILE)
        assert page.locator("main img").count() == 0
        shown.get_by_role("button", name=f"Reload {HOSTILE}").click()
        page.locator("#report", has_text=f"{HOSTILE} is loaded.").wait_for()
        assert page.locator("#report img").count() == 0
        assert shown.get_by_role("link").get_attribute("href") == "#try/%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E"


def test_model_is_unloaded_and_loaded_by_its_buttons(browser, zoo, url):
    """With the keyboard: the focus stays at the model, though its card is drawn again."""
    with open_page(browser, url) as page:
        changed = card(page, "changed")
        changed.get_by_role("button", name="Unload changed").press("Enter")
        page.locator("#report.good", has_text="changed is unloaded.").wait_for()
        changed.locator(".chip", has_text="version 1 unloaded").wait_for()
        assert zoo.get("/v2/models/changed").status == 404
        assert changed.get_by_role("link").count() == 0
        page.wait_for_function("() => document.activeElement.getAttribute('aria-label') === 'Load changed'")
        page.keyboard.press("Enter")
        page.locator("#report.good", has_text="changed is loaded.").wait_for()
        changed.locator(".chip", has_text="version 1 serves").wait_for()
        assert zoo.get("/v2/models/changed").status == 200


def test_load_that_fails_shows_why(browser, url):
    with open_page(browser, url, expected=("412",)) as page:
        card(page, "broken").get_by_role("button", name="Load broken").click()
        report = page.locator("#report.bad")
        report.wait_for()
        assert report.inner_text().startswith("broken was not loaded: model 'broken' version 1 cannot read ")
        assert page.locator("[aria-live=polite] > #report").count() == 1
        report.get_by_role("button", name="Close the message").click()
        assert report.is_hidden()


def test_reload_shows_the_models_that_do_not_serve(browser, url):
    with open_page(browser, url, expected=("412",)) as page:
        card(page, "empty")
        page.get_by_role("button", name="Reload the config").click()
        page.locator("#report.bad", has_text="Not everything serves: model 'broken' version 1 cannot read ").wait_for()


def test_states_that_change_elsewhere_are_shown(browser, zoo, url):
    """The view polls, and keeps what a user has opened."""
    with open_page(browser, url) as page:
        card(page, "number").locator("details.tensors > summary").click()
        assert zoo.request("POST", "/v2/repository/models/digits/unload").status == 200
        try:
            card(page, "digits").locator(".chip", has_text="version 1 unloaded").wait_for()
            assert "model 'digits' was unloaded" in card(page, "number").locator(".reason").inner_text()
        finally:
            assert zoo.request("POST", "/v2/repository/models/digits/load").status == 200
        card(page, "digits").locator(".chip", has_text="version 1 serves").wait_for()


def test_view_is_readable_on_a_phone(browser, url):
    with open_page(browser, url, viewport=PHONE) as page:
        card(page, "digits")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        for button in page.locator("main button:visible").all():
            box = button.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= PHONE["width"]
        screenshot(page, "models-phone")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_view_in_light_and_dark(browser, url, scheme):
    """Text stands out from its background: 4.5 to 1, as WCAG 2.2 asks for in section 1.4.3."""
    with open_page(browser, url, color_scheme=scheme) as page:
        card(page, "digits")
        screenshot(page, f"models-{scheme}")
        for color in ("text", "muted", "accent", "good", "bad", "warning"):
            for background in ("surface", "background"):
                assert contrast(page, color, background) >= 4.5, (color, background)


def contrast(page, color, background):
    """Return the contrast of two custom properties (WCAG 2.2, "contrast ratio")."""
    lighter, darker = sorted((luminance(page, color), luminance(page, background)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(page, name):
    value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')").strip()
    channels = [int(value[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# --- Where changes are not allowed


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """A service that nobody may change by calls."""
    needs_chromium()
    directory = tmp_path_factory.mktemp("closed")
    model_zoo.save(model_zoo.relu(), directory / "relu")
    config = write_config(directory, {"name": "relu", "base_path": "relu"})
    environ = {"OVMS_REST_MODEL_CONTROL": "none", "OVMS_REST_FILE_SYSTEM_POLL_WAIT_SECONDS": "0"}
    with serve(directory, "-w", "1", config=config, **environ) as running:
        running.wait_for_workers(1)
        running.directory = directory
        yield running


def test_without_permission_there_are_no_buttons_but_the_reason(browser, closed):
    with open_page(browser, f"http://127.0.0.1:{closed.port}/console") as page:
        card(page, "relu")
        assert page.get_by_role("button").all_inner_texts() == ["Reload the config"]
        reason = "Loading and unloading is not allowed over HTTP; OVMS_REST_MODEL_CONTROL is 'none'."
        assert page.get_by_text(reason).is_visible()


def test_refused_change_shows_the_reason_of_the_service(browser, closed):
    """As when the setting has changed since the page was loaded."""
    with open_page(browser, "about:blank", expected=("403",)) as page:
        settings = json.dumps({"version": "", "service": "", "obstacle": None})
        page.route("**/console/settings", lambda route: route.fulfill(body=settings))
        page.goto(f"http://127.0.0.1:{closed.port}/console")
        card(page, "relu").get_by_role("button", name="Unload relu").click()
        text = "relu was not unloaded: POST /v2/repository/models/relu/unload is not allowed over HTTP"
        page.locator("#report.bad", has_text=text).wait_for()
        assert closed.get("/v2/models/relu").status == 200


def test_reload_shows_whether_anything_has_changed(browser, closed):
    with open_page(browser, f"http://127.0.0.1:{closed.port}/console") as page:
        card(page, "relu")
        page.get_by_role("button", name="Reload the config").click()
        page.locator("#report.good", has_text="Nothing has changed.").wait_for()
        model_zoo.save(model_zoo.relu(), closed.directory / "relu", version=7)
        page.get_by_role("button", name="Reload the config").click()
        page.locator("#report.good", has_text="The changes serve.").wait_for()
        card(page, "relu").locator(".chip", has_text="version 7 serves").wait_for()
