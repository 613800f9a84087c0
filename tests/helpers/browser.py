"""Headless Chromium, for the tests of the console: Debian's browser, driven by playwright."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import PATIENCE

CHROMIUM = Path("/usr/bin/chromium")
# Nothing here needs the network, a GPU or an account; the sandbox needs rights that a container lacks.
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server"),
)
PHONE = {"width": 360, "height": 740}


def needs_chromium() -> None:
    """Skip a test where the browser or its driver is missing."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing (Debian's package chromium)")


@contextlib.contextmanager
def run_browser(*arguments: str) -> Iterator["object"]:
    """Run Chromium with further arguments; yield playwright's Browser."""
    needs_chromium()
    from playwright.sync_api import sync_playwright  # missing where these tests are skipped

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *arguments])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(browser, url: str, expected: tuple[str, ...] = (), **options) -> Iterator["object"]:
    """Open a URL in a context of its own; yield playwright's Page. Fail at the end for any error in its console.

    `expected` are parts of messages that a test provokes, such as the status of a call that is refused. `options` are
    those of playwright's `new_context`, such as `viewport`, `color_scheme` and `permissions`.

    `wait_for_function` needs an arrow function: the page's policy forbids the evaluation of any other text.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    context.set_default_timeout(PATIENCE * 1000)
    messages: list[str] = []
    try:
        page = context.new_page()
        page.on("console", lambda message: messages.append(f"{message.type}: {message.text} {message.location}"))
        page.on("pageerror", lambda error: messages.append(f"error: {error}"))
        page.goto(url)
        yield page
    finally:
        context.close()
    faults = [text for text in messages if text.startswith(("error", "warning"))]
    unexpected = [text for text in faults if not any(part in text for part in expected)]
    assert not unexpected, unexpected


def screenshot(page, name: str) -> None:
    """Save a picture of the whole page as NAME.png in the directory SCREENSHOTS of the environment, if that is set."""
    if directory := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{directory}/{name}.png", full_page=True)
