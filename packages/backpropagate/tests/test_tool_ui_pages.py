"""The pages of data, models and exports: what they read, and that they lead nowhere else."""

import html
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from starlette.testclient import TestClient

from backpropagate import Trainer
from backpropagate.cli.app import run
from backpropagate.presets import MODEL_PRESETS
from backpropagate.ui.app import build_app
from backpropagate.ui.background import BackgroundJobs
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
    rows = [{"prompt": f"<b>who</b> {i}", "completion": f"me & {i}" + "!" * i} for i in range(5)] + [{"nothing": 1}]
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
    assert (facts["rows"], facts["usable"], facts["left out"]) == ("6", "5", "1")
    assert '<td class="figure">6</td>' in text
    assert '<code class="line">{&#34;nothing&#34;: 1}</code>' in text
    cuts = json.loads(html.unescape(re.search(r'data-cuts="([^"]+)"', text)[1]))
    assert cuts[-1][1] == 0
    assert [over for _, over, _ in cuts] == sorted((over for _, over, _ in cuts), reverse=True)


def test_columns_are_mapped_and_a_cleaned_copy_is_written(page, place):
    rows = ["frage;reply body;id", "Who?;Me.;1", "Who?;Me.;2", ";x;3", "Where?;Here.;4"]
    (place / "odd.csv").write_text("\n".join(rows) + "\n")
    asked = {"path": "odd.csv", "columns": ["frage=prompt", "reply body=completion", "leave-out:id", ""]}
    text = page.get("/data/check", params=asked).text
    assert re.findall(r"<td><code>([^<]+)</code></td><td class=\"value\">([^<]*)</td><td class=\"nowrap\">([^<]+)", text) == [
        ("frage", "Who?", "only read"), ("reply body", "Me.", "trained on"), ("id", "1", "not used")]  # fmt: skip
    assert '<option value="leave-out:id" selected>' in text
    train = page.get("/data/train", params=asked | {"max_seq_length": "64"}).headers["location"]
    assert parse_qs(urlsplit(train).query) == {
        "data": ["odd.csv"], "max_seq_length": ["64"], "columns": ["frage=prompt\nreply body=completion"],
        "ignore_columns": ["id"]}  # fmt: skip
    assert ">frage=prompt\nreply body=completion</textarea>" in page.get(train).text
    form = asked | {"token": token_on(page), "dedup": "exact"}
    text = page.post("/data/clean", data=form).text
    assert "2 of 4 rows" in text
    assert "same as row" in text
    copy = place / "home/ui-outputs/uploads/odd-clean.jsonl"
    assert [json.loads(line)["frage"] for line in copy.read_text().splitlines()] == ["Who?", "Where?"]
    assert "2-odd-clean.jsonl" in page.post("/data/clean", data=form).text
    text = page.post("/data/clean", data=form | {"path": "d.jsonl", "columns": "", "dedup": "none"}).text
    assert re.search(r"− 6</span> <code>{&#34;nothing&#34;: 1}</code>", text)
    assert "INPUT_UI_PATH" in page.post("/data/clean", data=form | {"path": "/etc/passwd"}).text
    assert (place / "odd.csv").read_text().splitlines() == rows


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


def test_the_unpacked_small_model_may_be_read_from_any_folder(place, monkeypatch, write_letters):
    """A fresh user starts the page in a folder of data; the model is below the program's home."""
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(place.parent / "elsewhere"))
    model = place.parent / "elsewhere/models/SmolLM2"
    model.parent.mkdir(parents=True)
    write_letters(model, TEMPLATE)
    (model / "model.safetensors").write_bytes(b"")
    app = build_app(UiSpec(), find_places(UiSpec(), os.environ, shown=Path("output")))
    page = TestClient(app, base_url="http://127.0.0.1:7860")
    assert str(model) in page.get("/models").text
    assert 'class="card row"' in page.get("/data/preview", params={"path": "d.jsonl", "model": str(model)}).text
    for other in (model.parent, model / "..", model.parent / "../x", "/etc"):
        params = {"path": "d.jsonl", "model": str(other)}
        assert "INPUT_UI_PATH" in page.get("/data/preview", params=params).text, other


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
    assert 'hx-get="/models/presets"' in text  # the GPU has not been asked yet
    machine = page.app._app.state.site.machine
    machine._rails = [{"usable": True, "device": "cuda", "memory": 12 * 2**30}]
    machine._looked = time.monotonic()
    text = page.get("/models/presets").text
    row = text[text.index("<strong>qwen2.5-7b<") :].partition("</tr>")[0]
    assert re.findall(r'class="chip \w+">([\w ]+)', row) == ["fits", "too large", "too large"]
    assert 'hx-get="/models/presets"' not in page.get("/models").text


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


def test_a_file_is_uploaded_into_the_page_s_folder_only(page, place):
    token = token_on(page)

    def send(name, content=b'{"text": "x"}\n'):
        return page.post("/data/upload", data={"token": token}, files={"file": (name, content)})

    where = send("../../my data.jsonl").headers["location"]
    assert where.endswith("uploads%2Fmy-data.jsonl")
    assert (place / "home/ui-outputs/uploads/my-data.jsonl").read_bytes() == b'{"text": "x"}\n'
    assert "&#34;text&#34;" in page.get(where).text
    assert send("my data.jsonl").headers["location"].endswith("2-my-data.jsonl")
    for name in ("evil.sh", ".jsonl", "", "x.jsonl.exe"):
        assert send(name).status_code == 404, name
    assert page.post("/data/upload", files={"file": ("x.jsonl", b"{}")}).status_code == 403
    assert {file.name for file in (place / "home/ui-outputs/uploads").iterdir()} == {"my-data.jsonl", "2-my-data.jsonl"}


def token_on(page):
    return re.search(r'"x-token": "([^"]+)"', page.get("/").text)[1]


def test_what_runs_and_what_finished_is_at_home(page):
    assert "1. Look at your data" in page.get("/").text
    Trainer("./m", output="output", rail=FakeRail(), steps=2, lora_r=2).train("d.jsonl", on_bad_row="skip")
    text = page.get("/").text
    assert "m on d.jsonl" in text
    assert "Chat with the newest model" in text
    assert "lora.r" in page.get("/settings").text


def test_a_run_is_noted_and_deleted_where_the_page_may_write(page, place):
    own = place / "home/ui-outputs/mine"
    trainer = Trainer("./m", output=own, rail=FakeRail(), steps=2, lora_r=2)
    run_id = trainer.train("d.jsonl", on_bad_row="skip").run_id
    address = re.search(rf"/runs/\w+/{run_id}", page.get("/runs").text)[0]
    token = token_on(page)
    named = {"token": token, "note": "the <b>one</b>", "tags": "good, pirate", "title": " Pirate\n <i>two</i> "}
    page.post(f"{address}/note", data=named)
    text = page.get(address).text
    assert "the &lt;b&gt;one&lt;/b&gt;" in text
    for shown in (text, page.get("/runs").text, page.get("/runs?q=pirate").text):
        assert "Pirate &lt;i&gt;two&lt;/i&gt;" in shown
    lines = page.get(f"{address}/steps.csv").text.splitlines()
    assert lines[0].startswith("step,seconds,loss,")
    assert [line.partition(",")[0] for line in lines[1:]] == ["1", "2"]
    assert '<span class="tag">pirate</span>' in text
    report = page.get(f"{address}/report")
    assert report.headers["content-disposition"] == f'attachment; filename="run-{run_id}.html"'
    assert "<script" not in report.text
    assert page.post(f"{address}/remove", data={"token": token, "confirm": "xxxxxx"}).status_code == 400
    assert page.post(f"{address}/remove", data={"token": token, "confirm": run_id[-6:]}).status_code == 303
    assert not (own / "runs" / run_id).exists()
    trainer = Trainer("./m", output="output", rail=FakeRail(), steps=2, lora_r=2)
    other = trainer.train("d.jsonl", on_bad_row="skip").run_id
    address = re.search(rf"/runs/\w+/{other}", page.get("/runs").text)[0]
    assert page.post(f"{address}/remove", data={"token": token, "confirm": other[-6:]}).status_code == 403


def test_multi_runs_and_merges_are_started_with_what_was_chosen(page, place, monkeypatch):
    for seed in (1, 2):
        trainer = Trainer("./m", output="output", rail=FakeRail(), steps=2, lora_r=2, seed=seed)
        trainer.train("d.jsonl", on_bad_row="skip", resume=False)
    jobs = page.app._app.state.site.jobs
    monkeypatch.setattr(type(jobs), "run_queue", lambda _: None)  # nothing is run here: what is queued is looked at
    token = token_on(page)
    keys = re.findall(r'name="adapter" value="([^"]+)"', page.get("/merge").text)
    assert page.post("/merge", data={"token": token, "adapter": keys[:1], "folder": "x"}).status_code == 400
    places = {f"place-{keys[0]}": "2", f"place-{keys[1]}": "1"}
    form = {"token": token, "adapter": keys, "method": "ties", "weights": "0.7,0.3", "folder": "both", **places}
    assert page.post("/merge", data=form).status_code == 303
    form = {"token": token, "data": "d.jsonl\nd.jsonl", "model": "./m", "runs": "2", "merge": "slao", "folder": "weeks"}
    assert page.post("/multi-run", data=form).status_code == 303
    assert page.post("/multi-run", data=form | {"data": "/etc/passwd"}).status_code == 400
    assert page.post("/multi-run", data=form | {"runs": "0"}).status_code == 400
    merged, weeks = [job.argv for job in jobs.queue.jobs()]
    ids = [key.partition("/")[2] for key in keys]
    assert merged == ("merge", f"{place}/output/runs/{ids[1]}/lora", f"{place}/output/runs/{ids[0]}/lora",
                      "--method=ties", "--weights=0.7,0.3", f"--output={place}/home/ui-outputs/both/lora")  # fmt: skip
    assert weeks == ("multi-run", "--data=d.jsonl", "--data=d.jsonl", "--model=./m", "--runs=2", "--merge=slao",
                     f"--output={place}/home/ui-outputs/weeks")  # fmt: skip


def test_a_model_answers_and_votes_become_rows(place, pico_model):
    spec = UiSpec(data_dirs=(str(pico_model.parent),))
    app = build_app(spec, find_places(spec, os.environ, shown=Path("output")))
    page = TestClient(app, base_url="http://127.0.0.1:7860")
    with page:  # one event loop, which the model's process belongs to
        token = token_on(page)
        target = re.search(rf'value="(model/[^"]*{pico_model.name})"', page.get("/chat").text)[1]
        ask = {"token": token, "messages": json.dumps([{"role": "user", "content": "who are you"}])}

        def answer(**form):
            return [json.loads(line) for line in page.post("/chat/answer", data=ask | form).text.splitlines()]

        lines = answer(target=target)
        assert lines[-1] == {"end": True}, lines
        said = "".join(line.get("piece", "") for line in lines)
        pair = page.post("/chat/pair", data={"token": token, "target": target, "other": target}).json()["pair"]
        assert "".join(line.get("piece", "") for line in answer(pair=pair, side="right")) == said
        vote = {"token": token, "pair": pair, "better": "left", "prompt": "who", "left": "a", "right": "b"}
        assert page.post("/chat/vote", data=vote).json()["left"] == pico_model.name
        rows = (place / "home/ui-outputs/preferences.jsonl").read_text()
        assert json.loads(rows) == {"prompt": "who", "chosen": "a", "rejected": "b"}
        assert page.post("/chat/answer", data=ask | {"target": "model//etc"}).status_code == 404
        assert page.post("/chat/answer", data=ask | {"target": target, "messages": "[]"}).status_code == 400
        assert page.post("/chat/vote", data=vote | {"pair": "x"}).status_code == 400


class OllamaTags(BaseHTTPRequestHandler):
    """An Ollama that lists two models; the name of one looks like a flag."""

    def do_GET(self):
        models = [
            {"name": name, "model": name, "size": 5, "digest": "sha256:" + "a" * 64}
            for name in ("mine:latest", "--prompt=x")
        ]
        body = json.dumps({"models": models, "version": "0.32.0"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_chat_offers_checkpoints_merged_adapters_and_what_ollama_has(page, place, monkeypatch):
    trainer = Trainer("./m", output="output", rail=FakeRail(), steps=3, lora_r=2, save_steps=1)
    run_id = trainer.train("d.jsonl", on_bad_row="skip").run_id
    merged = place / "home/ui-outputs/both/lora"
    merged.mkdir(parents=True)
    (merged / "adapter_config.json").write_text("{}")
    text = page.get("/chat").text
    option = re.search(rf'<option value="(\w+/{run_id})"[^>]*data-steps="([^"]+)"', text)
    steps = json.loads(html.unescape(option[2]))
    assert [label for _, label in steps] == ["before training", *(label for _, label in steps[1:-1]), "final"]
    assert steps[0][0] == "model/./m"
    assert [key for key, _ in steps[1:]] == [*(f"{option[1]}@{label[5:]}" for _, label in steps[1:-1]), option[1]]
    assert len(steps) > 2
    assert '<option value="merged/both">both (merged)</option>' in text
    assert '<option value="merged/both">both (merged)</option>' in page.get("/export").text
    blind = page.get("/chat?blind=yes").text  # two different models from the start
    assert re.findall(r'<option value="([^"]+)" selected', blind) == ["merged/both"]
    monkeypatch.setattr(BackgroundJobs, "run_queue", lambda _: None)
    form = {"token": token_on(page), "source": "merged/both", "format": "lora"}
    assert page.post("/export", data=form).status_code == 303
    assert page.app._app.state.site.jobs.newest()[0].argv[1] == str(merged)
    assert page.post("/export", data=form | {"source": "merged/../../m"}).status_code in (400, 404)
    ask = {"token": token_on(page), "messages": json.dumps([{"role": "user", "content": "who"}])}
    with ThreadingHTTPServer(("127.0.0.1", 0), OllamaTags) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
        assert page.post("/chat/answer", data=ask | {"target": "ollama/mine:latest"}).status_code == 404
        assert page.get("/chat/ollama").json() == [{"key": "ollama/mine:latest", "label": "mine:latest"}]
        assert '<optgroup label="In Ollama"><option value="ollama/mine:latest">' in page.get("/chat").text
        server.shutdown()
    assert page.get("/chat/ollama").json() == []
    assert page.post("/chat/answer", data=ask | {"target": "ollama/--prompt=x"}).status_code == 404
