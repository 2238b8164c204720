"""The web page in Chromium: every page in both themes, with nothing from elsewhere, and a run that moves by itself.

`just ui-browser` runs it, where Chromium is installed.
"""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest
from browser import PHONE, find_violations, find_wide, open_chromium, open_tab, sync_api
from pico import write_pico_tokenizer

from backpropagate import Trainer
from bp_runs.events import EvalDone, Notice, StepDone
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server of its own, with runs of each kind: its address, the output folder, and addresses of pages."""
    place = tmp_path_factory.mktemp("site")
    (place / "m").mkdir()
    write_pico_tokenizer(place / "m")
    (place / "m/config.json").write_text("{}")
    (place / "m/model.safetensors").write_bytes(b"")
    rows = [{"prompt": f"who {i}", "completion": f"captain marlow {i}"} for i in range(40)]
    (place / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = place / "output"
    trainer = Trainer(str(place / "m"), output=output, rail=FakeRail(), steps=12, lora_r=2, sample_prompts=["who?"])
    one = trainer.train(place / "d.jsonl").run_id
    two = trainer.train(place / "d.jsonl", seed=2, lr=1e-3).run_id
    many = trainer.multi_run(place / "d.jsonl", runs=3, steps=3).run_id
    home = {"BACKPROPAGATE_HOME": str(place / "home")}
    words = [sys.executable, "-m", "backpropagate", "ui", "--json", "--port", "0", "--output", str(output)]
    with subprocess.Popen(words, cwd=place, env={**os.environ, **home}, stdout=subprocess.PIPE, text=True) as child:
        try:
            told = json.loads("".join(iter(child.stdout.readline, "}\n")) + "}")
            runs = f"/runs/{hashlib.sha256(str(output).encode()).hexdigest()[:8]}"
            pages = {
                "home": "/",
                "runs": "/runs",
                "chat": "/chat",
                "blind": "/chat?blind=yes",
                "multi-run form": "/multi-run",
                "merge": "/merge",
                "queue": "/queue",
                "settings": "/settings",
                "run": f"{runs}/{one}",
                "multi-run": f"{runs}/{many}",
                "card": f"{runs}/{many}/card",
                "compare": f"/compare?run={runs[6:]}/{one}&run={runs[6:]}/{two}",
                "choose": "/compare",
                "train": "/train",
                "again": f"/train?from={runs[6:]}/{one}",
                "data": "/data",
                "folder": f"/data?path={place}",
                "file": f"/data?path={place}/d.jsonl&model={place}/m",
                "export": "/export",
                "models": "/models",
                "error": f"{runs}/nothing",
            }
            yield told["address"], output, pages
        finally:
            child.kill()


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as browser:
        yield browser


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_whole_accessible_and_from_here(site, chromium, theme):
    address, _, pages = site
    tab, wrong = open_tab(chromium, theme)
    for name, path in pages.items():
        tab.goto(address + path)
        if name in ("run", "compare"):
            tab.wait_for_selector("canvas")
        if name == "file":
            tab.wait_for_selector(".tokens mark")
            tab.get_by_role("button", name="Check the whole file").click()
            tab.wait_for_selector("#h-checked")
        if name == "train":
            tab.wait_for_selector(".verdict", timeout=90_000)
        assert not find_violations(tab), f"{name} in {theme}"
    assert not wrong


def test_no_page_scrolls_sideways_on_a_phone(site, chromium):
    address, _, pages = site
    tab, _ = open_tab(chromium, size=PHONE)
    for name, path in pages.items():
        tab.goto(address + path)
        assert find_wide(tab) == [], name


def test_the_form_says_what_fits_and_hides_what_does_not_apply(site, chromium):
    address, _, _ = site
    tab, wrong = open_tab(chromium)
    tab.goto(address + "/train")
    beta = tab.locator("#f-kto_beta")
    tab.locator("summary", has_text="Preferences").wait_for(state="hidden")
    tab.select_option("#f-method", "kto")
    tab.locator("summary", has_text="Preferences").click()
    sync_api.expect(beta).to_be_visible()
    sync_api.expect(tab.locator("#f-dpo_beta")).to_be_hidden()
    tab.fill("#f-data", "d.jsonl")
    tab.fill("#f-steps", "abc")
    tab.get_by_role("button", name="Start training").click()
    sync_api.expect(tab.locator("#e-steps")).to_have_text("Steps must be a whole number.")
    assert [text for text in wrong if "400" not in text] == []


def test_a_run_moves_while_it_trains(site, chromium):
    address, output, pages = site
    store = RunStore(output)
    tab, wrong = open_tab(chromium)

    def step(number):
        return StepDone(step=number, steps=50, loss=2 / number, learning_rate=1e-4, grad_norm=1.0, tokens=9,
                        tokens_per_second=1234.0, memory_bytes=2**30, temperature=61.0)  # fmt: skip

    with pytest.raises(KeyboardInterrupt), store.start(settings={}, rail="fake") as writer:
        writer.emit(step(1))
        tab.goto(f"{address}{pages['run'].rpartition('/')[0]}/{writer.run_id}")
        tab.wait_for_selector("canvas")
        live = tab.locator('[data-live="step"]')
        assert live.inner_text() == "1"
        for number in range(2, 8):
            writer.emit(step(number))
        sync_api.expect(live).to_have_text("7")
        sync_api.expect(tab.locator('[data-live="heat"]')).to_have_text("61 °C")
        sync_api.expect(tab.locator('[data-live="left"]')).not_to_have_text("–")
        writer.emit(EvalDone(step=7, loss=0.5, tokens=9, best=True))
        writer.emit(Notice(message="the card is hot", level="warning", details={"celsius": 90}))
        sync_api.expect(tab.locator(".notices")).to_contain_text("the card is hot")
        sync_api.expect(tab.locator(".figures")).to_contain_text("validation loss")
        raise KeyboardInterrupt
    sync_api.expect(tab.locator("#summary .status")).to_have_text("interrupted")
    assert not wrong


def test_the_table_renews_itself_but_not_under_who_is_choosing(site, chromium):
    address, output, _ = site
    tab, wrong = open_tab(chromium)
    tab.goto(address + "/runs")
    before = tab.locator("tbody tr").count()
    place = output.parent
    trainer = Trainer(str(place / "m"), output=output, rail=FakeRail(), steps=2, lora_r=2)
    trainer.train(place / "d.jsonl", seed=9)
    sync_api.expect(tab.locator("tbody tr")).to_have_count(before + 1, timeout=9000)
    boxes = tab.get_by_role("checkbox")
    boxes.nth(0).check()
    trainer.train(place / "d.jsonl", seed=10)
    time.sleep(5)
    assert tab.locator("tbody tr").count() == before + 1
    assert boxes.nth(0).is_checked()
    boxes.nth(1).check()
    tab.get_by_role("button", name="Compare selected runs").click()
    tab.wait_for_selector("canvas")
    assert not wrong


def test_the_page_is_read_without_a_mouse_and_without_scripts(site, chromium):
    address, _, pages = site
    tab, _ = open_tab(chromium)
    tab.goto(address + "/runs")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to content"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    plain = chromium.new_context(java_script_enabled=False).new_page()
    for name in ("runs", "run", "card", "compare"):
        plain.goto(address + pages[name])
        assert plain.locator("table:visible").first.is_visible(), name


def test_the_page_works_as_a_path_of_other_people_s_sites_cannot(site, chromium):
    """Another page can neither frame ours nor read it."""
    address, _, _ = site
    tab = chromium.new_context().new_page()
    tab.route("http://evil.example/", lambda route: route.fulfill(body=f"<iframe src='{address}/runs'></iframe>"))
    tab.goto("http://evil.example/")
    tab.wait_for_timeout(500)
    assert "Runs" not in (tab.frames[-1].content() if len(tab.frames) > 1 else "")
    blocked = tab.evaluate(f"fetch('{address}/runs').then(r => r.text(), e => 'blocked')")
    assert blocked == "blocked"
