"""The pages of data, models and exports: what they read, and that they lead nowhere else."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from backpropagate import Trainer
from backpropagate.cli.app import run
from backpropagate.presets import MODEL_PRESETS
from backpropagate.ui.app import build_app
from backpropagate.ui.folders import find_places
from backpropagate.ui_spec import UiSpec
from bp_runs.testing import FakeRail

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def place(tmp_path, monkeypatch, write_letters):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    write_letters(tmp_path / "m", TEMPLATE)
    (tmp_path / "m/model.safetensors").write_bytes(b"")
    rows = [{"prompt": f"<b>who</b> {i}", "completion": f"me & {i}"} for i in range(5)] + [{"nothing": 1}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/e.csv.gz").write_bytes(b"")
    (tmp_path / "deep/secret.pem").write_bytes(b"")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    return tmp_path


@pytest.fixture
def page(place):
    app = build_app(UiSpec(), find_places(UiSpec(), os.environ, shown=Path("output")))
    return TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False)


def test_data_files_are_browsed_in_the_page_s_folders(page, place):
    assert f">{place}/</a>" in page.get("/data").text
    text = page.get("/data", params={"path": str(place)}).text
    assert re.findall(r">([^<>]+)</a>", text[text.index('class="files"') :]) == ["deep/", "home/", "m/", "d.jsonl"]
    text = page.get("/data", params={"path": str(place / "deep")}).text
    assert "e.csv.gz" in text
    assert "secret.pem" not in text
    assert "↑" in text
    for path in ("/", "/etc", str(place.parent), "..", "deep/../.."):
        assert page.get("/data", params={"path": path}).status_code == 404, path
    assert page.get("/data", params={"path": "nothing"}).status_code == 404


def test_the_mask_is_shown_token_by_token_as_data_preview_tells_it(page, place, capsys):
    text = page.get("/data/preview", params={"path": "d.jsonl", "model": "./m", "skip": "1"}).text
    assert run(["data", "preview", "d.jsonl", "--model", "./m", "--skip", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(re.findall('class="card row"', text)) == len(rows) == 3
    trained = "".join(re.findall(r'<mark class="trained(?: special)?">(.*?)</mark>', text, re.DOTALL)[1:])
    wanted = "".join(piece["text"] for row in rows for piece in row["pieces"] if piece["trained"])
    assert trained.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">") == wanted
    assert "<b>who" not in text
    assert f"{rows[0]['trained_tokens']} of {rows[0]['tokens']} tokens trained" in text
    assert "not trained on" in page.get("/data/preview", params={"path": "d.jsonl", "model": "./m", "skip": "5"}).text


def test_a_file_is_checked_as_validate_does(page, place):
    text = page.get("/data/check", params={"path": "d.jsonl", "model": "./m"}).text
    facts = dict(re.findall(r"<dt>([\w ]+)</dt><dd>([\d,]+)</dd>", text))
    assert (facts["read"], facts["whole"], facts["dropped"]) == ("6", "5", "1")
    assert '<td class="figure">6</td>' in text


@pytest.mark.parametrize("part", ["preview", "check"])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"path": "/etc/passwd"}, "INPUT_UI_PATH"),
        ({"path": ""}, "INPUT_UI_PATH"),
        ({"path": "d.jsonl", "model": "/etc"}, "INPUT_UI_PATH"),
    ],
)
def test_a_look_is_refused_in_words(page, part, asked, told):
    answer = page.get(f"/data/{part}", params=asked)
    assert answer.status_code == 200  # a part of a page that is there
    assert told in answer.text
    assert "Traceback" not in answer.text


def test_nothing_is_fetched_for_a_look_and_bad_numbers_are_told(page):
    asked = {"path": "d.jsonl", "model": "nobody/nothing", "max_seq_length": "many"}
    assert "INPUT_COMMAND_LINE" in page.get("/data/preview", params=asked).text
    assert "DEP_HUB_UNREACHABLE" in page.get("/data/preview", params=asked | {"max_seq_length": ""}).text


def test_models_are_those_of_the_command(page, capsys):
    text = page.get("/models").text
    assert run(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert re.findall(r'href="/train\?model=([\w.-]+)"', text) == [row["name"] for row in rows] == list(MODEL_PRESETS)
    for row in rows:
        for value in (row["licence"], row["restriction"], f"{row['needed_bytes']['qlora'] / 2**30:.1f} GiB"):
            assert value in text
    assert 'name="model" value="smollm3-3b"' in page.get("/train?model=smollm3-3b").text


def test_an_export_is_started_from_the_run_s_own_folder_into_the_page_s(page, place):
    assert "Nothing to export yet" in page.get("/export").text
    run_id = Trainer("./m", output="output", rail=FakeRail(), steps=2, lora_r=2).train("d.jsonl").run_id
    text = page.get("/export").text
    source = re.search(rf'value="(\w+/{run_id})"', text)[1]
    token = re.search(r'"x-token": "([^"]+)"', text)[1]

    def send(**form):
        return page.post("/export", data={"token": token, "source": source, **form})

    for wrong in ({"format": "exe"}, {"quantization": "q1"}, {"source": "x/y"}, {"source": source + "/../x"}):
        assert send(**wrong).status_code == 400, wrong
    assert send(format="lora", force="yes").status_code == 303
    (started,) = page.app._app.state.site.jobs.newest()
    target = place / f"home/ui-outputs/exports/{run_id}-lora"
    assert list(started.argv) == [
        "export",
        f"{place}/output/runs/{run_id}/lora",
        "--format=lora",
        f"--output={target}",
        "--force",
    ]
    until = time.monotonic() + 120
    jobs = page.app._app.state.site.jobs
    while jobs._runners and time.monotonic() < until:
        jobs.reap()
        time.sleep(0.1)
    assert (target / "adapter_model.safetensors").is_file(), page.get("/jobs/1").text
    assert str(target) in page.get("/export").text
