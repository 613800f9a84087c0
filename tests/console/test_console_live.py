"""The console's view "live" in headless Chromium, and the modules that it is made of, called with values."""

import json
import re

import model_zoo
import pytest
from browser import PHONE, open_page, screenshot
from prometheus_client.parser import text_string_to_metric_families
from service import PATIENCE, serve, write_config

HOSTILE = '<img src=x onerror="throw 1">{a="b"} \\n'
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
NO_VALUE = "\N{EN DASH}"
METRICS = {"metrics": {"enable": True}}
WAIT = PATIENCE * 1000  # milliseconds until playwright gives up


@pytest.fixture(scope="module")
def measured(tmp_path_factory, browser):
    """A service with metrics, a model "relu" and one whose name is markup."""
    directory = tmp_path_factory.mktemp("measured")
    model_zoo.save(model_zoo.relu(), directory / "relu")
    config = write_config(
        directory, {"name": "relu", "base_path": "relu"}, {"name": HOSTILE, "base_path": "relu"}, monitoring=METRICS
    )
    with serve(directory, "-w", "2", config=config) as running:
        yield running


@pytest.fixture(scope="module")
def modules(browser, measured):
    """A function that calls JavaScript with the modules of the view and an argument, for tests of values."""
    with open_page(browser, f"http://127.0.0.1:{measured.port}/console#log") as page:

        def call(code, argument=None):
            return page.evaluate(
                """async ([code, argument]) => {
                    const load = (name) => import(`/console/${name}.js`);
                    const [metrics, history, chart, live] = await Promise.all(
                        ["metrics", "history", "chart", "views/live"].map(load));
                    return await CALL(metrics, history, chart, live, argument);
                }""".replace("CALL", f"(async (metrics, history, chart, live, argument) => {{{code}}})"),
                [code, argument],
            )

        yield call


@pytest.fixture(scope="module")
def shared(browser, measured):
    """A page with the view, which has read the metrics twice; its expected errors are those of its own tests."""
    with open_page(browser, f"http://127.0.0.1:{measured.port}/console#live", expected=("503",)) as page:
        page.wait_for_selector(".live-table tbody td", timeout=WAIT)
        page.evaluate('import("/console/views/live.js").then((live) => Object.assign(globalThis, {live}))')
        wait_for_steps(page, 1)
        yield page


@pytest.fixture
def view(shared):
    """The page as it is after it was opened, but for its history."""
    yield shared
    shared.set_viewport_size({"width": 1280, "height": 900})
    shared.emulate_media(color_scheme="light")
    shared.evaluate('location.hash = "#live"')
    shared.mouse.move(0, 0)


def wait_for_steps(page, count):
    """Wait until the page has this number of steps ."""
    page.wait_for_function("(count) => live.monitor.history.steps.length >= count", arg=count, timeout=WAIT)


def wait_for_next_step(page):
    wait_for_steps(page, page.evaluate("live.monitor.history.steps.length") + 1)


def counters(service, name):
    """Return the number of successful and of failed inferences of a model, and the buckets of its request time."""
    found = {"ovms_requests_success": 0.0, "ovms_requests_fail": 0.0, "buckets": []}
    for line in service.get("/metrics").body.decode().splitlines():
        if f'name="{name}"' not in line:
            continue
        if (family := line.partition("{")[0]) in found and 'method="ModelInfer"' in line:
            found[family] += float(line.rpartition(" ")[2])
        if family == "ovms_request_time_us_bucket":
            found["buckets"].append((float(re.search('le="([^"]*)"', line)[1]), float(line.rpartition(" ")[2])))
    return found


def quantile(q, buckets):
    """Return the quantile in microseconds as Prometheus's histogram_quantile does, from cumulative buckets."""
    rank = q * buckets[-1][1]
    index = next(index for index, (_, count) in enumerate(buckets) if count >= rank)
    (lower, below) = buckets[index - 1] if index else (0, 0)
    upper, count = buckets[index]
    return lower + (upper - lower) * (rank - below) / (count - below)


def cells(page, name):
    """Return the texts of the row of a model or worker in the tables, by the heads of the columns."""
    return page.evaluate(
        """(name) => {
            const row = [...document.querySelectorAll(".live-table tbody tr")].find(
                (row) => row.cells[0].textContent === name);
            const heads = [...row.closest("table").querySelectorAll("thead th")].map((head) => head.textContent);
            return Object.fromEntries(heads.map((head, index) => [head, row.cells[index].textContent]));
        }""",
        name,
    )


# --- The view


def test_requests_errors_and_times_agree_with_the_metrics(view, measured):
    sums = """() => {
        const steps = live.monitor.history.steps.map(({models}) => models?.get("relu")).filter(Boolean);
        return ["succeeded", "failed"].map((key) => steps.reduce((sum, step) => sum + step[key], 0));
    }"""
    before, start = counters(measured, "relu"), view.evaluate(sums)
    for _ in range(30):
        assert measured.infer("relu", BODY).status == 200
    for _ in range(3):
        assert measured.infer("relu", {"inputs": []}).status == 400
    after = counters(measured, "relu")
    view.wait_for_function(f"(start) => ({sums})()[1] >= start + 3", arg=start[1], timeout=WAIT)
    assert view.evaluate(sums) == [start[0] + 30, start[1] + 3]
    assert after["ovms_requests_success"] - before["ovms_requests_success"] == 30
    assert after["ovms_requests_fail"] - before["ovms_requests_fail"] == 3

    shown = cells(view, "relu")
    grown = [(le, count - past) for (le, count), (_, past) in zip(after["buckets"], before["buckets"], strict=True)]
    for head, q in (("p50", 0.5), ("p99", 0.99)):
        seconds = quantile(q, grown) / 1e6
        assert shown[head] == view.evaluate("(seconds) => live.writeSeconds(seconds)", seconds)
    rates = view.evaluate(
        """() => {
            const {models, seconds} = live.monitor.history.steps.at(-1);
            const {succeeded, failed} = models.get("relu");
            return [succeeded / seconds, failed / seconds].map(live.writeRate);
        }"""
    )
    assert [shown["Requests"], shown["Errors"]] == [rates[0], f"{rates[1]} (invalid)"]
    screenshot(view, "live")


def test_workers_show_their_memory_cpu_and_busy_share(view):
    worker = cells(view, "worker 0")
    assert re.fullmatch(r"[\d.]+ MiB", worker["Memory"])
    assert re.fullmatch(r"[\d.]+ %", worker["Busy"])
    assert re.fullmatch(r"[\d.]+ %", worker["CPU"])


def test_charts_draw_their_series(view):
    wait_for_steps(view, 2)
    charts = view.locator(".chart")
    assert charts.count() == 8
    for title in ("Requests per second", "Errors per second", "CPU of workers", "Memory of workers", "Busy workers"):
        chart = view.locator(".chart", has=view.get_by_role("heading", name=title, exact=True))
        assert chart.locator("path.chart-line").count() == 2, title


def test_names_of_models_are_shown_as_text(view):
    assert cells(view, HOSTILE)["Requests"] == "0/s"
    assert view.locator(".chart-name", has_text="<img").first.text_content() == HOSTILE
    assert view.locator("#view img").count() == 0


def test_arrow_keys_and_pointer_move_a_cursor_that_reads_out_the_values_of_all_charts(view):
    wait_for_steps(view, 2)
    slider = view.get_by_role("slider", name="Requests per second")
    cursors = view.locator('.chart-cursor[visibility="visible"]')
    assert slider.get_attribute("aria-valuetext") == "now"
    slider.focus()
    slider.press("Home")
    text = slider.get_attribute("aria-valuetext")
    assert re.match(r"\d\d:\d\d:\d\d, \d+ s ago: ", text)
    assert re.search(r"relu [\d.]+/s", text)
    assert cursors.count() == view.locator(".chart").count()
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") != text
    slider.press("Escape")
    assert slider.get_attribute("aria-valuetext") == "now"
    assert cursors.count() == 0
    slider.hover()
    assert cursors.count() == view.locator(".chart").count()
    assert re.match(r"\d\d:\d\d:\d\d, ", slider.get_attribute("aria-valuetext"))


def test_history_goes_on_while_another_view_is_shown(view):
    view.evaluate("globalThis.first = live.monitor.history.steps[0]")
    view.evaluate('location.hash = "#log"')
    view.wait_for_selector(".view-log")
    wait_for_next_step(view)
    view.evaluate('location.hash = "#live"')
    view.wait_for_selector(".chart .chart-line", state="attached")
    assert view.evaluate("live.monitor.history.steps[0] === globalThis.first")


def test_page_that_is_shown_again_reads_at_once(view):
    """The page is made to believe that it is hidden, and before its next reading, in 10 s, that it is not."""
    view.evaluate('Object.defineProperty(document, "hidden", {configurable: true, get: () => globalThis.isHidden})')
    view.evaluate("globalThis.isHidden = true")
    try:
        wait_for_next_step(view)
        with view.expect_request("**/metrics", timeout=5000):
            view.evaluate('globalThis.isHidden = false; document.dispatchEvent(new Event("visibilitychange"))')
    finally:
        view.evaluate("delete document.hidden")


def test_view_fits_a_phone(view):
    view.set_viewport_size(PHONE)
    for scheme in ("light", "dark"):
        view.emulate_media(color_scheme=scheme)
        wait_for_next_step(view)
        assert view.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert 300 < int(view.locator(".chart-plot").first.get_attribute("width")) < PHONE["width"]
        screenshot(view, f"live-phone-{scheme}")


def test_failed_reading_is_explained_and_leaves_a_gap(view):
    view.route("**/metrics", lambda route: route.fulfill(status=503, body='{"error": "too busy"}'))
    notice = view.locator(".live-notice p")
    notice.wait_for(timeout=WAIT)
    assert re.fullmatch(r"No values since \d\d:\d\d:\d\d: too busy", notice.text_content())
    assert cells(view, "relu")["Requests"] == NO_VALUE
    view.unroute("**/metrics")
    view.wait_for_selector(".live-notice", state="hidden", timeout=WAIT)
    assert cells(view, "relu")["Requests"] == "0/s"


def test_service_that_does_not_respond_is_noted_while_the_page_waits(view):
    pending = []
    view.evaluate("live.monitor.patience = 100")
    view.route("**/metrics", lambda route: pending.append(route))
    view.locator(".live-notice p", has_text="no response for 0.1 s; still waiting").wait_for(timeout=WAIT)
    view.evaluate("live.monitor.patience = 10_000")
    assert len(pending) == 1
    pending[0].continue_()
    view.unroute("**/metrics")
    view.wait_for_selector(".live-notice", state="hidden", timeout=WAIT)
    assert view.evaluate("live.monitor.history.steps.at(-1).models !== undefined")


def test_family_that_the_service_does_not_list_is_named(view, measured):
    lines = measured.get("/metrics").body.decode().splitlines(keepends=True)
    text = "".join(line for line in lines if "ovms_rest_worker_resident_bytes" not in line)
    view.route("**/metrics", lambda route: route.fulfill(body=text))
    try:
        chart = view.locator(".chart", has=view.get_by_role("heading", name="Memory of workers", exact=True))
        chart.locator(".chart-empty:not([hidden])").wait_for(timeout=WAIT)
        shown = chart.locator(".chart-empty").text_content()
        assert shown.startswith("The service has no ovms_rest_worker_resident_bytes")
        assert not chart.locator(".chart-plot").is_visible()
    finally:
        view.unroute("**/metrics")
        wait_for_next_step(view)


def test_disabled_metrics_show_how_to_enable_them(browser, tmp_path):
    model_zoo.save(model_zoo.relu(), tmp_path / "relu")
    config = write_config(tmp_path, {"name": "relu", "base_path": "relu"})
    with (
        serve(tmp_path, "-w", "1", config=config) as service,
        # Chromium itself notes every response 404.
        open_page(browser, f"http://127.0.0.1:{service.port}/console#live", expected=("404",)) as page,
    ):
        notice = page.locator(".live-notice p")
        notice.wait_for(timeout=WAIT)
        assert notice.text_content() == service.get("/metrics").json()["error"]
        assert "OVMS_REST_METRICS_ENABLE=true" in notice.text_content()
        assert not page.locator(".chart").first.is_visible()
        # Asked again by hand only, so that no error fills the console.
        with page.expect_response("**/metrics", timeout=WAIT):
            page.get_by_role("button", name="Check again").click()


# --- Parsing


def test_text_is_parsed_as_by_prometheus(modules, measured):
    text = (
        measured.get("/metrics").body.decode()
        + 'extra{a="x} 1",b="\\\\n\\n\\"",c=""} 1.5e+06 1700000000000\nextra -Inf\nextra{d="1",} NaN\n'
    )
    ours = modules(
        """return JSON.stringify([...metrics.parseMetrics(argument)].flatMap(([name, samples]) =>
            samples.map(({labels, value}) => [name, Object.fromEntries(labels), String(value)])))""",
        text,
    )
    theirs = [
        [sample.name.removesuffix("_total"), sample.labels, sample.value]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    parsed = [[name, labels, float(value.replace("Infinity", "inf"))] for name, labels, value in json.loads(ours)]
    key = json.dumps
    assert sorted(map(key, parsed)) == sorted(map(key, theirs))


def test_quantiles_are_those_of_prometheus(modules):
    bounds = [10, 18, 32, float("inf")]
    calls = [
        (0.5, [0, 4, 0, 0]),
        (0.99, [1, 4, 95, 0]),
        (0.5, [10, 10, 10, 0]),
        (0.01, [10, 10, 10, 0]),
        (1, [3, 0, 2, 0]),
    ]
    expected = []
    for q, counts in calls:
        cumulative = [(bound, sum(counts[: index + 1])) for index, bound in enumerate(bounds)]
        expected.append(quantile(q, cumulative))
    code = "return argument.map(([q, counts]) => metrics.quantile(q, [10, 18, 32, Infinity], counts))"
    assert modules(code, calls) == pytest.approx(expected)
    assert expected[0] == 14


def test_quantile_beyond_the_last_bound_is_that_bound_and_of_nothing_is_null(modules):
    code = "return argument.map((counts) => metrics.quantile(0.9, [10, 18, Infinity], counts))"
    assert modules(code, [[0, 0, 5], [0, 0, 0]]) == [18, None]


# --- Steps

READ = """
const write = ({name, succeeded, failed, queue, buckets}) => [
    `ovms_requests_success{method="ModelInfer",name="${name}",version="1"} ${succeeded}`,
    `ovms_requests_success{method="ModelMetadata",name="${name}",version="1"} 1000`,
    `ovms_requests_fail{method="ModelInfer",name="${name}",version="1"} ${failed ?? 0}`,
    `ovms_rest_requests_refused{kind="timeout",name="${name}",version="1"} ${failed ?? 0}`,
    `ovms_wait_for_infer_req_time_us_sum{name="${name}",version="1"} ${queue ?? 0}`,
    ...(buckets ?? [0, 0, 0]).map((count, index) =>
        `ovms_request_time_us_bucket{le="${["10", "100", "+Inf"][index]}",name="${name}",version="1"} ${count}`),
].join("\\n");
const read = (at, ...models) => metrics.readMetrics(models.map(write).join("\\n"), at);
"""


def test_step_is_the_difference_of_two_readings(modules):
    code = """
    const step = metrics.subtract(
        read(0, {name: "m", succeeded: 5, failed: 1, queue: 100, buckets: [2, 5, 5]}),
        read(2000, {name: "m", succeeded: 15, failed: 4, queue: 2000100, buckets: [2, 11, 15]}));
    const {kinds, ...rest} = step.models.get("m");
    return {seconds: step.seconds, kinds: [...kinds], ...rest};
    """
    assert modules(READ + code) == {
        "seconds": 2,
        "succeeded": 10,
        "failed": 3,
        "queueUs": 2000000,
        "kinds": [["timeout", 3]],
        "buckets": [[1, 6], [2, 4]],
    }


def test_counters_that_begin_again_give_no_negative_values(modules):
    """All counters of a model begin again if one of them is lower, also those that are higher by now."""
    code = """
    const step = metrics.subtract(
        read(0, {name: "m", succeeded: 500, failed: 10, queue: 9000, buckets: [100, 500, 500]}),
        read(2000, {name: "m", succeeded: 450, failed: 12, queue: 50, buckets: [0, 450, 450]}));
    const {succeeded, failed, queueUs, buckets} = step.models.get("m");
    return [succeeded, failed, queueUs, buckets];
    """
    assert modules(READ + code) == [450, 12, 50, [[1, 450]]]


def test_new_generation_and_death_of_a_worker_are_events(modules):
    code = """
    const at = (generation, restarts) =>
        metrics.readMetrics(`ovms_rest_generation ${generation}\\novms_rest_worker_restarts ${restarts}`, 0);
    const events = ([a, b]) => {
        const {reloaded, died} = metrics.subtract(at(...a), at(...b));
        return [reloaded, died];
    };
    return argument.map(events);
    """
    pairs = [[(1, 0), (1, 0)], [(1, 0), (2, 0)], [(1, 0), (1, 1)], [(5, 3), (1, 0)]]
    assert modules(code, pairs) == [[False, False], [True, False], [False, True], [True, False]]


def test_versions_of_a_model_are_added_up(modules):
    code = """
    const line = (version, value) =>
        `ovms_requests_success{method="ModelInfer",name="m",version="${version}"} ${value}\\n`;
    return metrics.readMetrics(line(1, 3) + line(2, 4), 0).models.get("m").succeeded;
    """
    assert modules(code) == 7


# --- History


def test_history_is_bounded_to_ten_minutes(modules):
    code = """
    const kept = new history.History();
    for (let index = 0; index <= 1000; index++) kept.add(read(index * 2000, {name: "m", succeeded: index}));
    const quick = new history.History();
    for (let index = 0; index <= 700; index++) quick.add(read(index, {name: "m", succeeded: index}));
    return [kept.steps.length, kept.steps[0].at, kept.steps.at(-1).at, quick.steps.length];
    """
    assert modules(READ + code) == [300, 1402000, 2000000, 600]


def test_models_beyond_the_fifth_are_one_series(modules):
    """The series of the most requested models are their own; the rest is summed, also in quantiles."""
    code = """
    const kept = new history.History();
    const at = (time) => read(time, ...Array.from({length: 40}, (_, index) =>
        ({name: `m${index}`, succeeded: time * index, buckets: [0, time * index, time * index]})));
    kept.add(at(0));
    kept.add(at(2000));
    const slots = kept.modelSlots();
    const rates = kept.ofModels(slots, ({succeeded}, {seconds}) => succeeded / seconds);
    return [
        slots.map(({name, slot, count}) => [name === history.OTHERS ? "others" : name, slot, count ?? 0]),
        rates.map(({values}) => values[0]),
        kept.quantiles(0.5, slots).map(({values}) => values[0]),
    ];
    """
    slots, rates, quantiles = modules(READ + code)
    assert slots == [*([f"m{number}", number - 34, 0] for number in range(35, 40)), ["others", 6, 35]]
    assert rates == [*(number * 1000 for number in range(35, 40)), sum(range(35)) * 1000]
    assert quantiles == pytest.approx([55e-6] * 6)


def test_models_that_are_gone_count_among_the_others_while_their_values_are_kept(modules):
    code = """
    const kept = new history.History();
    const at = (time, first) => read(time, ...Array.from({length: 4}, (_, index) =>
        ({name: `m${first + index}`, succeeded: time})));
    for (const reading of [at(0, 0), at(2000, 0), at(4000, 4), at(6000, 4)]) kept.add(reading);
    const others = () => kept.modelSlots().find(({name}) => name === history.OTHERS)?.count ?? null;
    const before = others();
    kept.add(at(2000 + history.SPAN, 4));
    kept.add(at(4000 + history.SPAN, 4));
    return [before, others()];
    """
    assert modules(READ + code) == [3, None]


def test_control_worker_is_the_one_that_is_neither_busy_nor_idle(modules):
    code = """
    const kept = new history.History();
    const text = ["resident_bytes{worker=\\"0\\"} 1", "resident_bytes{worker=\\"1\\"} 1", "busy{worker=\\"1\\"} 0"];
    kept.add(metrics.readMetrics(text.map((line) => `ovms_rest_worker_${line}\\n`).join(""), 0));
    return ["0", "1"].map((label) => kept.isControl(label));
    """
    assert modules(code) == [True, False]


def test_series_keep_their_colors_when_the_most_requested_models_change(modules):
    code = """
    const kept = new history.History();
    const at = (time, counts) => read(time, ...counts.map((succeeded, index) => ({name: `m${index}`, succeeded})));
    const show = () => kept.modelSlots().map(({name, slot}) => [name === history.OTHERS ? "others" : name, slot]);
    kept.add(at(0, [0, 0, 0, 0, 0, 0, 0]));
    kept.add(at(2000, [70, 60, 50, 40, 30, 20, 10]));
    const before = show();
    kept.add(at(4000, [70, 60, 50, 40, 30, 20, 1000]));
    return [before, show()];
    """
    before, after = modules(READ + code)
    assert before == [["m0", 1], ["m1", 2], ["m2", 3], ["m3", 4], ["m4", 5], ["others", 6]]
    assert after == [["m0", 1], ["m1", 2], ["m2", 3], ["m3", 4], ["m6", 5], ["others", 6]]


def test_quantiles_cover_the_last_five_readings(modules):
    code = """
    const kept = new history.History();
    for (let index = 0; index <= 8; index++) {
        const count = index >= 2 ? 10 : 0;
        kept.add(read(index * 2000, {name: "m", succeeded: count, buckets: [0, count, count]}));
    }
    return kept.quantiles(0.5, kept.modelSlots())[0].values;
    """
    assert modules(READ + code) == [None, *[pytest.approx(55e-6)] * 5, None, None]


def test_busy_share_is_that_of_the_last_15_readings(modules):
    code = """
    const kept = new history.History();
    for (let index = 0; index <= 20; index++) {
        const busy = index >= 18 ? 1 : 0;
        kept.add(metrics.readMetrics(`ovms_rest_worker_busy{worker="0"} ${busy}`, index * 2000));
    }
    return kept.busyShares(kept.workerSlots())[0].values.at(-1);
    """
    assert modules(code) == pytest.approx(3 / 15)


def test_hidden_page_and_slow_parsing_slow_the_readings_down(modules):
    code = "return [live.nextDelay(false, 10), live.nextDelay(true, 10), live.nextDelay(false, 500)]"
    assert modules(code) == [2000, 10000, 10000]


# --- Text and axes


def test_values_are_written_with_their_unit(modules):
    code = """return [
        live.writeRate(0.123), live.writeRate(1234), live.writeSeconds(0.0000456), live.writeSeconds(0.01234),
        live.writeSeconds(2.5), live.writeBytes(1536), live.writeBytes(2 ** 30), live.writeShare(0.254),
    ]"""
    expected = ["0.12/s", "1,234/s", "45.6 µs", "12.3 ms", "2.5 s", "1.5 KiB", "1 GiB", "25.4 %"]
    assert modules(code) == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("linearTicks(1)", [0, 0.5, 1]),
        ("linearTicks(7)", [0, 2, 4, 6, 8]),
        ("linearTicks(1234)", [0, 500, 1000, 1500]),
        ("linearTicks(80 * 2 ** 20, 2 ** 20)", [0, *(number * 2**20 for number in (20, 40, 60, 80))]),
        ("logarithmicTicks(3e-3, 4e-3)", [1e-3, 2e-3, 5e-3, 1e-2]),
        ("logarithmicTicks(1e-4, 2e-1)", [1e-4, 1e-3, 1e-2, 1e-1, 1]),
        ("timeStep(600000, 6)", 120000),
    ],
)
def test_ticks_are_round_and_include_all_values(modules, call, expected):
    assert modules(f"return chart.{call}") == pytest.approx(expected)
