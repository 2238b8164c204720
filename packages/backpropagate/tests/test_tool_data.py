"""`backprop data` from the command line to files and JSON, on a pico tokenizer."""

import json

import pytest

from backpropagate.cli.app import run

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def place(tmp_path, monkeypatch, write_letters):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "m"
    write_letters(folder, CHATML)
    (folder / "model.safetensors").write_bytes(b"")
    rows = [{"prompt": f"Q{n}", "completion": f"Answer {n}"} for n in range(9)]
    rows += [rows[0], {"foo": 1}, {"prompt": "Q", "completion": "long " * 50}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def told(capsys, argv) -> dict:
    assert run([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_preview_shows_what_is_trained_masked_and_cut(place, capsys):
    shown = told(capsys, ["data", "preview", "d.jsonl", "--model", "./m", "--max-seq-length", "64", "--rows", "12"])
    assert shown["schema"] == "backpropagate.data-preview/1"
    first, bad, long = shown["rows"][0], shown["rows"][10], shown["rows"][11]
    assert "".join(p["text"] for p in first["pieces"] if p["trained"]) == "Answer 0<|im_end|>"
    assert bad["rejected"]["code"] == "ROW_COLUMNS_UNKNOWN"
    assert long["tokens"] == 64
    assert any(p["truncated"] for p in long["pieces"])
    argv = ["data", "preview", "d.jsonl", "--model", "./m", "--skip", "10", "--rows", "2", "--max-seq-length", "64"]
    assert run(argv) == 0
    text = capsys.readouterr().out
    assert "row 11: not trained on\nROW_COLUMNS_UNKNOWN" in text
    assert "⟦trained⟧  masked  ✂truncated" in text, "brackets where there are no colours"
    assert "row 12: 44 of 64 tokens trained, 208 cut off" in text
    assert "⟦long long" in text
    assert "⟧✂" in text


def test_preview_in_colours(place, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run(["data", "preview", "d.jsonl", "--model", "./m", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[1;32mA" in text, "trained: bold green"
    assert "\x1b[1;7;32m<|im_end|>" in text, "special: reversed"
    assert "\x1b[2mQ" in text, "masked: dim"
    assert "⟦" not in text


def test_report_as_json_text_page_and_gate(place, capsys):
    report = told(capsys, ["data", "report", "d.jsonl", "--model", "./m", "--max-seq-length", "64", "--html", "r.html"])
    assert report["gate"] is None
    assert (report["rows"], report["usable"], report["exact"]["count"], report["overlong"]) == (12, 11, 1, 1)
    assert "exact duplicates" in (place / "r.html").read_text()
    assert run(["data", "report", "d.jsonl", "--max-duplicates", "0.5", "--min-rows", "3"]) == 0
    assert "12 rows, 11 usable" in capsys.readouterr().out
    assert run(["data", "report", "d.jsonl", "--max-duplicates", "0"]) == 65
    assert "INPUT_DATASET_VALIDATION_FAILED" in capsys.readouterr().err
    assert run(["data", "report", "d.jsonl", "--max-duplicates", "0", "--min-rows", "3", "--json"]) == 65
    gate = json.loads(capsys.readouterr().out)["gate"]  # one document
    assert gate == {"passed": False, "broken": ["duplicates: 1 of 12 rows are 8.33%, and 0.00% is the most"]}
    assert told(capsys, ["data", "report", "d.jsonl", "--min-rows", "3"])["gate"] == {"passed": True, "broken": []}
    assert run(["data", "report", "d.jsonl", "--max-overlong", "0"]) == 1
    assert run(["data", "report", "d.jsonl", "--max-contaminated", "0"]) == 1
    against = told(capsys, ["data", "report", "d.jsonl", "--against", "d.jsonl"]) if capsys.readouterr() else {}
    assert against["contaminated"]["count"] >= 10


def test_split_clean_and_convert_lose_nothing(place, capsys):
    done = told(capsys, ["data", "clean", "d.jsonl", "--output", "c.jsonl"])
    assert (done["read"], done["written"], done["dropped"]) == (12, {"c.jsonl": 10}, 2)
    done = told(capsys, ["data", "split", "c.jsonl", "-o", "a.jsonl", "--heldout", "b.jsonl", "--share", "0.3"])
    assert done["written"] == {"a.jsonl": 7, "b.jsonl": 3}
    done = told(capsys, ["data", "convert", "c.jsonl", "--to", "messages", "-o", "e.jsonl"])
    assert done["written"] == {"e.jsonl": 10}
    assert json.loads((place / "e.jsonl").read_text().splitlines()[0])["messages"][1]["content"] == "Answer 0"
    assert run(["data", "convert", "d.jsonl", "--to", "messages", "-o", "f.jsonl"]) == 1
    assert "line 11" in capsys.readouterr().err
    assert run(["data", "convert", "d.jsonl", "--to", "alpaca", "-o", "f.jsonl", "--on-bad-row", "skip"]) == 0
    assert "1 left out" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--share", "0"], ["--share", "1.5"], ["--heldout", "a.jsonl"]])
def test_arguments_out_of_range(place, capsys, argv):
    assert (
        run(
            [
                "data",
                "split",
                "d.jsonl",
                "-o",
                "a.jsonl",
                *(["--heldout", "b.jsonl"] if "--share" in argv else []),
                *argv,
            ]
        )
        == 1
    )
    assert "CONFIG_INVALID_SETTING" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preview", "report", "split", "clean", "convert"])
def test_each_has_help_with_an_example(capsys, command):
    assert run(["data", command, "--help"]) == 0
    assert f"backprop data {command}" in capsys.readouterr().out


def test_validate_reads_rows_as_the_method_does(place, capsys):
    pairs = [{"prompt": "Q", "chosen": f"good {n}", "rejected": "bad"} for n in range(3)]
    (place / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert run(["validate", "p.jsonl", "--model", "./m", "--method", "dpo", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "⟦good 0<|im_end|>⟧" in text
    assert "⟦bad<|im_end|>⟧" in text
    assert "3 rows read = 3 whole" in text
    assert run(["validate", "p.jsonl", "--model", "./m"]) == 1
    assert "one for sft is wanted" in capsys.readouterr().err
    assert run(["validate", "p.jsonl", "--model", "./m", "--method", "dpo", "--min-tokens", "3"]) == 1
    assert "CONFIG_INVALID_SETTING" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["data", "preview", "d.jsonl", "--model", "./m", "--skip", "-1"],
        ["data", "preview", "d.jsonl", "--model", "./m", "--max-seq-length", "1"],
        ["data", "report", "d.jsonl", "--max-duplicates", "5"],
        ["validate", "d.jsonl", "--model", "./m", "--rows", "-2"],
    ],
)
def test_numbers_that_make_no_sense_are_told(place, capsys, argv):
    assert run(argv) == 1
    assert "[INPUT_COMMAND_LINE]" in capsys.readouterr().err
