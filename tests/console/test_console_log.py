"""The console's view of the log in a browser: the last errors, and the level."""

import json

import model_zoo
import pytest
from browser import PHONE, needs_chromium, open_page, screenshot
from service import serve, write_config

SHAPES = {"name": "dims", "datatype": "INT64", "shape": [2], "data": [3, 3]}
VALUES = {"name": "x", "datatype": "FP32", "shape": [4], "data": [1, 2, 3, 4]}
LEVELS = ("log_error", "log_warning", "log_info", "log_verbose_level")
INFO = {"log_error": True, "log_warning": True, "log_info": True, "log_verbose_level": 0}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A service whose log has an error, and gets a warning with every inference."""
    needs_chromium()
    directory = tmp_path_factory.mktemp("failing")
    model_zoo.save(model_zoo.reshaping(), directory / "reshaping")
    config = write_config(directory, *({"name": name, "base_path": name} for name in ("reshaping", "<b>none")))
    with serve(directory, "-w", "1", config=config, OVMS_REST_MODEL_CONTROL="local") as running:
        running.wait_for_workers(1)
        yield running


@pytest.fixture
def url(failing):
    return f"http://127.0.0.1:{failing.port}/console#log"


def test_errors_of_the_start_are_shown_as_text(browser, failing, url):
    with open_page(browser, url) as page:
        line = page.locator(".lines li", has_text="model '<b>none' does not serve: ")
        line.wait_for()
        assert line.locator(".level").inner_text() == "error"
        assert line.locator(".process").inner_text() == str(failing.process.pid)
        assert page.locator("main b").count() == 0


def test_new_lines_appear_while_the_view_is_shown(browser, failing, url):
    with open_page(browser, url) as page:
        page.locator(".lines li").first.wait_for()
        before = len(failing.get("/console/errors").json()["lines"])
        assert failing.infer("reshaping", {"inputs": [VALUES, SHAPES]}).status == 400
        page.wait_for_function("count => document.querySelectorAll('.lines li').length > count", arg=before)
        newest = page.locator(".lines li").first
        assert newest.locator(".level").inner_text() == "warning"
        assert "model 'reshaping' version 1" in newest.inner_text()
        page.get_by_label("errors only").check()
        assert set(page.locator(".lines .level").all_inner_texts()) == {"error"}


def test_level_is_shown_and_changed(browser, failing, url):
    with open_page(browser, url) as page:
        level = page.get_by_label("Level")
        page.wait_for_function("() => document.getElementById('log-level')?.value === 'info'")
        try:
            level.select_option("warning")
            page.locator("#report.good", has_text="level warning").wait_for()
            settings = failing.get("/v2/logging").json()
            assert [settings[key] for key in LEVELS] == [True, True, False, 0]
            level.blur()
            assert failing.request("POST", "/v2/logging", {"log_verbose_level": 3, "log_info": True}).status == 200
            page.wait_for_function("() => document.getElementById('log-level')?.value === 'debug'")
            assert failing.request("POST", "/v2/logging", {"log_warning": False}).status == 200
            page.wait_for_function("() => document.getElementById('log-level')?.value === ''")
        finally:
            failing.request("POST", "/v2/logging", INFO)


def test_level_that_may_not_be_changed_is_disabled_with_the_reason(browser, url):
    with open_page(browser, "about:blank") as page:
        settings = json.dumps({"version": "", "service": "", "obstacle": "is not allowed"})
        page.route("**/console/settings", lambda route: route.fulfill(body=settings))
        page.goto(url)
        page.wait_for_function("() => document.getElementById('log-level')?.value === 'info'")
        assert page.get_by_label("Level").is_disabled()
        assert page.get_by_text("Changing it is not allowed.").is_visible()


def test_refused_level_shows_the_reason_and_the_level_in_effect(browser, url):
    with open_page(browser, "about:blank", expected=("403",)) as page:
        refusal = json.dumps({"error": "POST /v2/logging is not allowed"})

        def refuse(route):
            if route.request.method == "POST":
                route.fulfill(status=403, body=refusal)
            else:
                route.continue_()

        page.route("**/v2/logging", refuse)
        page.goto(url)
        page.wait_for_function("() => document.getElementById('log-level')?.value === 'info'")
        page.get_by_label("Level").select_option("debug")
        page.locator("#report.bad", has_text="The level was not changed: POST /v2/logging is not allowed").wait_for()
        page.wait_for_function("() => document.getElementById('log-level')?.value === 'info'")


def test_polling_ends_with_the_view(browser, url):
    with open_page(browser, url) as page:
        page.locator(".lines li").first.wait_for()
        page.goto(url.replace("#log", "#models"))
        page.locator("main h1", has_text="Models").wait_for()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_event("request", lambda request: request.url.endswith("/v1/config"))
        page.wait_for_event("request", lambda request: request.url.endswith("/v1/config"))
        assert not [each for each in asked if each.endswith("/console/errors")]


def test_service_that_does_not_answer_is_named_until_it_does(browser, url):
    with open_page(browser, url, expected=("ERR_FAILED",)) as page:
        page.locator(".lines li").first.wait_for()
        page.route("**/console/errors", lambda route: route.abort())
        fault = page.locator("main .notice.bad")
        fault.wait_for()
        assert "does not answer" in fault.inner_text()
        page.unroute("**/console/errors")
        fault.wait_for(state="hidden")


def test_view_fits_a_phone(browser, url):
    with open_page(browser, url, viewport=PHONE, color_scheme="dark") as page:
        page.locator(".lines li").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        screenshot(page, "log-phone")
