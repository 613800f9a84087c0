"""The console's shell in a browser: tabs, reports, and where it is served."""

import pytest
from browser import PHONE, needs_chromium, open_page
from service import free_port, serve

TABS = {"Models": "#models", "Try it": "#try", "Live": "#live", "Log": "#log"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo with a control address, whose port is `control`."""
    needs_chromium()
    control = free_port()
    directory = tmp_path_factory.mktemp("demo")
    variables = {"OVMS_REST_CONTROL_BIND": f"127.0.0.1:{control}", "OVMS_REST_METRICS_ENABLE": "true"}
    with serve(directory, "-w", "1", **variables) as running:
        running.control = control
        running.wait_for_workers(2)
        yield running


@pytest.fixture
def url(demo):
    return f"http://127.0.0.1:{demo.control}/"


def current(page):
    """Return the tab that is marked as shown, and the name of the view."""
    page.wait_for_selector("main section.view > *")
    view = page.locator("main section.view").get_attribute("aria-label")
    return page.locator("#tabs [aria-current=page]").inner_text(), view


def test_root_leads_to_the_models(browser, url):
    with open_page(browser, url) as page:
        assert current(page) == ("Models", "Models")
        assert page.url == f"{url}console"
        assert page.title() == "Models \u00b7 ovms_rest console"
        assert page.locator("#version").inner_text() == "0.1.0"


def test_tabs_are_used_by_keyboard(browser, url):
    with open_page(browser, url) as page:
        current(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        for name, hash_ in TABS.items():
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.textContent") == name
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"
            page.keyboard.press("Enter")
            page.wait_for_url(f"**/console{hash_}")
            page.wait_for_function("name => document.title.startsWith(name)", arg=name)
            assert current(page) == (name, name)


def test_link_skips_the_tabs(browser, url):
    with open_page(browser, f"{url}console#log") as page:
        current(page)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.activeElement.id === 'view'")
        assert current(page) == ("Log", "Log")


@pytest.mark.parametrize("hash_", ["#none", "#", "#__proto__", "#models/%"])
def test_unknown_hash_shows_the_models(browser, url, hash_):
    with open_page(browser, f"{url}console{hash_}") as page:
        assert current(page) == ("Models", "Models")


def test_context_reaches_the_service_from_the_control_address(browser, demo, url):
    """The views get what they need: JSON, messages of errors, and inferences on the service's own address."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8, 1], "data": [0] * 64}
    with open_page(browser, url, expected=("404",)) as page:
        current(page)
        found = page.evaluate(
            """async (sample) => {
                const { get, getText, post, change } = await import("/console/service.js");
                const { service } = await get("/console/settings");
                const message = (error) => [error.message, error.status];
                return {
                    service,
                    name: (await get("/v2")).name,
                    text: await getText("/v2/health/live"),
                    inferred: (await (await post(`${service}/v2/models/digits/infer`, sample)).json()).model_name,
                    refused: (await post("/v2/models/digits/infer", sample)).status,
                    unknown: await get("/v2/models/none").catch(message),
                    failed: await change("/v2/repository/models/none/unload").catch(message),
                };
            }""",
            {"inputs": [tensor]},
        )
    assert found == {
        "service": f"http://127.0.0.1:{demo.port}",
        "name": "ovms_rest",
        "text": "",
        "inferred": "digits",
        "refused": 404,
        "unknown": ["unknown model 'none'; configured: 'digits', 'number'", 404],
        "failed": ["unknown model 'none'", 404],
    }


def test_models_are_changed_on_the_control_address(browser, demo, url):
    """The page is of the same origin as its calls, which are allowed there alone."""
    with open_page(browser, url) as page:
        page.get_by_role("button", name="Unload number").click()
        page.locator("#report.good", has_text="number is unloaded.").wait_for()
        assert demo.get("/v2/models/number").status == 404
        page.get_by_role("button", name="Load number").click()
        page.locator("#report.good", has_text="number is loaded.").wait_for()
        assert demo.get("/v2/models/number").status == 200


def test_tabs_work_again_when_the_service_answers_again(browser, url):
    with open_page(browser, "about:blank", expected=("503",)) as page:
        refusal = '{"error": "the service is shutting down"}'
        page.route("**/console/settings", lambda route: route.fulfill(status=503, body=refusal))
        page.goto(url)
        page.locator("main .notice.bad", has_text="the service is shutting down").wait_for()
        page.unroute("**/console/settings")
        page.get_by_role("link", name="Log").click()
        page.locator("main h1", has_text="Log").wait_for()
        assert page.locator("main .notice.bad:visible").count() == 0


def test_service_that_is_gone_is_named(browser, url):
    nobody = f"http://127.0.0.1:{free_port()}"
    script = "url => import('/console/service.js').then(({ get }) => get(url)).catch((error) => error.message)"
    with open_page(browser, url, expected=("Content Security Policy", "ERR_", "violates")) as page:
        current(page)
        assert page.evaluate(script, f"{nobody}/v2").startswith(f"{nobody} does not answer (")


def test_policy_is_enforced(browser, url):
    """Neither inline scripts nor attributes of markup run, wherever they come from."""
    markup = "<img src=x onerror=\"document.title='run'\"><p style='position: fixed'>x</p>"
    with open_page(browser, url, expected=("Content Security Policy", "404")) as page:
        current(page)
        page.evaluate(
            """(markup) => {
                const script = document.createElement("script");
                script.textContent = "document.title = 'run'";
                document.body.append(script);
                const div = document.createElement("div");
                div.id = "injected";
                div.innerHTML = markup;
                document.body.append(div);
            }""",
            markup,
        )
        page.wait_for_function("() => document.querySelector('#injected img').complete")
        assert page.title() != "run"
        assert page.evaluate("getComputedStyle(document.querySelector('#injected p')).position") == "static"


@pytest.mark.parametrize("hash_", TABS.values())
def test_views_fit_a_phone(browser, url, hash_):
    with open_page(browser, f"{url}console{hash_}", viewport=PHONE) as page:
        current(page)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_background_follows_the_color_scheme(browser, url, scheme):
    with open_page(browser, url, color_scheme=scheme) as page:
        channels = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
        assert (sum(channels[:3]) > 3 * 128) is (scheme == "light")
