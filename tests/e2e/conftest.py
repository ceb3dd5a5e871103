"""A real Chromium for pages that open from disk; where there is none, its tests are skipped with the reason.

What is tested end to end runs as users run it, without the checks of types and shapes that unit tests are run with.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from tests.checked import as_users_run

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

OpenPage = Callable[..., Page]


def find_chromium() -> str | None:
    """`$CHROMIUM`, or the first browser of the usual names on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what drives a browser, before tests are chosen by their marks."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Without checks, but those of other folders, which pytest asks here too."""
    with as_users_run() if Path(__file__).parent in item.path.parents else nullcontext():
        return (yield)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(_NAMES)} is on the path and $CHROMIUM is not set")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_ARGS)
        yield browser
        browser.close()


def watched_pages(chromium: Browser) -> Iterator[OpenPage]:
    """Opens a file, `#hash` included, and waits until it is drawn.

    When it ends: no page asked for anything but files, wrote an error or a warning to the console, or threw.
    """
    complaints: list[str] = []
    pages: list[Page] = []

    def refuse(dialog: Dialog) -> None:
        complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_file(path: Path, fragment: str = "", **context: object) -> Page:
        page = chromium.new_page(**({"viewport": {"width": 1400, "height": 860}} | context))  # pyright: ignore[reportArgumentType]
        pages.append(page)
        page.set_default_timeout(20_000)
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url)
        )
        page.on("console", lambda m: complaints.append(m.text) if m.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", refuse)
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_file
    for page in pages:
        page.close()
    assert not complaints, complaints


@pytest.fixture(scope="session")
def flaws() -> Callable[[Page], list[str]]:
    """What axe finds in a page by any of its rules, in the light and the dark theme."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe-playwright-python: pip install '.[dev]'")

    def found(page: Page) -> list[str]:
        if not page.evaluate("'axe' in window"):
            page.evaluate(axe.AXE_SCRIPT)
        complaints = []
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            complaints += [
                f"{theme}: {violation['id']}: {node['html'][:160]} {node['failureSummary']}"
                for violation in page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
                for node in violation["nodes"]
            ]
        page.emulate_media(color_scheme=None, reduced_motion=None)
        return complaints

    return found


@pytest.fixture(scope="session")
def serious(flaws: Callable[[Page], list[str]]) -> Callable[[Page], list[str]]:
    """`flaws`, by its former name."""
    return flaws


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """`watched_pages` of one test."""
    yield from watched_pages(chromium)


@pytest.fixture(scope="module")
def open_shared(chromium: Browser) -> Iterator[OpenPage]:
    """`watched_pages` that the tests of a module share."""
    yield from watched_pages(chromium)


@pytest.fixture(scope="module")
def opened(html: Path, open_shared: OpenPage) -> Page:
    """The page of the module's file `html`."""
    return open_shared(html)


@pytest.fixture
def page(opened: Page) -> Page:
    """The module's page, as if just opened."""
    opened.mouse.move(0, 0)
    opened.evaluate(
        """() => {
            document.activeElement.blur();
            viewer.comparison?.readHash(new URLSearchParams());
            viewer.restore({});
            for (const one of document.querySelectorAll("details")) one.open = false;
            return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        }"""
    )
    return opened
