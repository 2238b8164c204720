"""Chromium for tests of the web page: it comes from the system, Playwright and axe from the group ``browser``."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if PROGRAM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="the group browser is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the group browser is not installed")

PHONE = {"width": 320, "height": 640}
DESK = {"width": 1240, "height": 860}


@contextmanager
def open_chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_tab(chromium, theme="light", size=DESK):
    """A tab, and what is wrong with its pages: requests to elsewhere, errors of scripts, messages of the console."""
    tab = chromium.new_context(color_scheme=theme, viewport=size).new_page()
    wrong = []
    tab.on("request", lambda r: urlsplit(r.url).hostname in ("127.0.0.1", None) or wrong.append(r.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda m: m.type in ("error", "warning") and "404" not in m.text and wrong.append(m.text))
    return tab, wrong


def find_violations(tab):
    """What axe finds on the page, with everything unfolded."""
    for details in tab.query_selector_all("details"):
        details.evaluate("e => e.open = true")
    found = axe.Axe().run(tab).response["violations"]
    return [(v["id"], [node["target"] for node in v["nodes"]][:3]) for v in found]


def find_wide(tab):
    """What makes the page scroll sideways: elements that stick out; empty if it doesn't scroll."""
    return tab.evaluate("""() => document.documentElement.scrollWidth <= innerWidth ? [] : [
        document.documentElement.scrollWidth, ...[...document.querySelectorAll("body *")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth && !e.closest(".wide, nav"))
        .map((e) => `${e.tagName}.${e.className} ${Math.round(e.getBoundingClientRect().right)}`)]""")


def picture_folder(fallback):
    """Where screenshots go: the folder in ``UI_SCREENSHOTS``, or one of the test's own."""
    folder = Path(os.environ.get("UI_SCREENSHOTS") or fallback)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
