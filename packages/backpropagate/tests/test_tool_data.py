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
    assert "⟦l│o│n│g│·│l│o│n│g" in text, "borders between tokens, and blanks"
    assert "⟧✂" in text
    assert "⏎" in text
    assert "next: backprop validate d.jsonl --model ./m" in text
    assert run([*argv, "--no-marks"]) == 0
    assert "⟦long long" in capsys.readouterr().out


def test_preview_jumps_to_bad_rows_and_names_columns_that_are_left_aside(place, capsys):
    rows = [{"question": "Q", "answer": "A", "id": n} for n in range(300)]
    rows[250] = {"question": "", "answer": "A"}
    (place / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(["data", "preview", "e.jsonl", "--model", "./m", "--bad"]) == 0
    text = capsys.readouterr().out
    assert text.count("not trained on") == 1
    assert "row 251: not trained on\nROW_EMPTY_TURN" in text
    assert "left aside in all 299 rows: id" in text
    assert run(["data", "preview", "e.jsonl", "--model", "./m", "--rows", "2"]) == 0
    assert "left aside in all 2 rows: id" in capsys.readouterr().out
    (place / "f.jsonl").write_text(json.dumps(rows[0]))
    assert run(["data", "preview", "f.jsonl", "--model", "./m", "--bad"]) == 0
    assert "every row can be trained on" in capsys.readouterr().out


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


@pytest.mark.parametrize("command", ["doctor", "preview", "report", "split", "clean", "convert"])
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
    assert "this run trains sft" in capsys.readouterr().err
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


BAD = [
    '{"messages": [',
    '{"question": "", "answer": "a"}',
    '{"foo": 1}',
    '{"messages": [{"role": "x", "content": "y"}]}',
]


def test_validate_lists_every_bad_row_without_a_model(place, capsys):
    good = '{"question": "Q", "answer": "A", "notes": "n"}'
    (place / "b.jsonl").write_text("\n".join([good, *BAD * 20, "", good]))
    assert run(["validate", "b.jsonl"]) == 1
    captured = capsys.readouterr()
    lines = [line.strip() for line in captured.out.splitlines()]
    assert lines[0] == "82 rows read: 2 chat; 80 can't be used"
    listed = [line for line in lines if line.startswith("line ")]
    assert [int(line.split(":")[0].removeprefix("line ")) for line in listed] == list(range(2, 82))
    assert [line.split(": ")[1] for line in listed[:4]] == [
        "ROW_JSON_BROKEN",
        "ROW_EMPTY_TURN",
        "ROW_COLUMNS_UNKNOWN",
        "ROW_ROLE_UNKNOWN",
    ]
    assert "columns trained on: answer" in lines
    assert "left aside in all 2 rows: notes" in lines
    assert lines[-1].startswith("Not checked: labels")
    assert "b.jsonl: 80 of 82 rows can't be used; first line 2: broken JSON" in captured.err
    assert "backprop data clean b.jsonl" in captured.err
    assert run(["validate", "b.jsonl", "--on-bad-row", "skip"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "line " in line]) == 80
    assert run(["validate", "b.jsonl", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["passed"], document["checked"], document["tokens"]) == (False, "rows", None)
    assert len(document["rejected"]) == 80


def test_validate_with_a_model_lists_every_bad_row_too(place, capsys):
    (place / "b.jsonl").write_text("\n".join([*BAD, '{"question": "Q", "answer": "A"}', *BAD]))
    assert run(["validate", "b.jsonl", "--model", "./m"]) == 1
    text = capsys.readouterr().out
    assert "9 rows read = 1 whole + 0 truncated + 8 dropped" in text
    assert text.count("line ") == 8
    (place / "all.jsonl").write_text("\n".join(BAD))
    for argv in (["--on-bad-row", "skip"], []):
        assert run(["validate", "all.jsonl", "--model", "./m", *argv]) != 0
        captured = capsys.readouterr()
        assert captured.out.count("line ") == 4, "also when all fail"
        fix = next(line for line in captured.err.splitlines() if line.startswith("  Fix:"))
        assert "all.jsonl" in fix


@pytest.mark.parametrize(
    "name", ["nofile.jsonl", "nofile.csv", "./nofile", "data/nofile.ndjson", "nofile.xlsx", "nofile.zip"]
)
def test_a_file_that_is_not_there_is_said_to_be_missing(place, capsys, name):
    assert run(["validate", name]) == 1
    assert f"there is no data file {name}" in capsys.readouterr().err
    (place / name).parent.mkdir(exist_ok=True)
    (place / name.replace("nofile", "nofiles", 1)).write_text("")
    assert run(["validate", name]) == 1
    assert "nofiles" in capsys.readouterr().err, "a file of nearly the same name is proposed"


def test_columns_are_mapped_ignored_and_never_lost(place, capsys):
    notes = "what a person wrote beside the question, many words"
    rows = [{"Frage": "Q", "Antwort": "A", "notes": notes}]
    (place / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(["validate", "g.jsonl"]) == 1
    assert "--columns Frage=prompt,Antwort=completion" in capsys.readouterr().err
    mapped = ["g.jsonl", "--columns", "Frage=prompt,Antwort=completion"]
    assert run(["validate", *mapped]) == 1
    assert "--ignore-columns notes" in capsys.readouterr().err
    assert run(["validate", *mapped, "--model", "./m"]) == 1
    assert "INPUT_DATASET_COLUMNS_LEFT" in capsys.readouterr().err
    convert = ["data", "convert", *mapped, "--to", "messages", "-o", "h.jsonl"]
    assert run(convert) == 1
    assert not (place / "h.jsonl").exists()
    assert run([*convert, "--ignore-columns", "notes"]) == 0
    assert json.loads((place / "h.jsonl").read_text())["messages"][0]["content"] == "Q"
    assert run(["validate", *mapped, "--ignore-columns", "notes"]) == 0


def test_a_folder_says_what_is_read_and_what_is_not(place, capsys):
    (place / "in").mkdir()
    for name in ("train.jsonl", "test.jsonl", "notes.md", "requirements.txt"):
        (place / "in" / name).write_text('{"question": "Q", "answer": "A"}\n')
    (place / "in/self").symlink_to(place / "in")
    assert run(["validate", "in"]) == 0
    text = capsys.readouterr().out
    assert "read: train.jsonl\n" in text
    for left in ("notes.md", "requirements.txt", "test.jsonl", "self"):
        assert f"not read: {left}: " in text
    assert "1 rows read" in text


def doctored(capsys, *argv):
    run(["data", "doctor", *argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    return found, {(finding["subject"], finding["status"]): finding for finding in found["findings"]}


def test_doctor_says_everything_on_one_page(place, capsys):
    western = "Frage;Antwort\nWie heißt der Vögel Größte?;Der Strauß ist der größte\nUnd der kleinste?;Der Kolibri\n"
    (place / "in").mkdir()
    (place / "in/a.csv").write_bytes(western.encode("cp1252"))
    (place / "in/b.jsonl").write_text('{"text": "<|im_start|>user\\nQ<|im_end|>"}\n{"a": \n')
    (place / "in/c.json").write_text('{"broken":\n')
    found, by = doctored(capsys, "in")
    assert found["passed"] is False
    assert by["encoding of a.csv", "bad"]["fix"].endswith("{set:data.encoding=cp1252}")
    assert "Größte" in by["encoding of a.csv", "bad"]["fix"]
    assert by["separator of a.csv", "ok"]["text"].startswith("semicolon")
    assert "data.columns=Frage=prompt,Antwort=completion" in by["columns", "bad"]["fix"]
    assert "in the text of 1 row (b.jsonl:1)" in by["rendered chats", "bad"]["text"]
    assert (
        "<|im_start|>" in by["control tokens", "look"]["text"] or "<|im_end|>" in by["control tokens", "look"]["text"]
    )
    assert found["files"] == ["a.csv", "b.jsonl", "c.json"]
    assert run(["data", "doctor", "in", "--encoding", "cp1252", "--columns", "Frage=prompt,Antwort=completion"]) == 1
    text = capsys.readouterr().out
    assert "✓ encoding of a.csv" in text
    assert "not UTF-8" not in text
    fixed, by = doctored(capsys, "in/a.csv", "--encoding=cp1252", "--columns=Frage=prompt,Antwort=completion", "-m./m")
    assert (fixed["passed"], fixed["report"]["lengths"]["unit"]) == (True, "tokens")
    assert "one turn, several turns" in by["template", "ok"]["text"]
    assert "can't say tools" in by["template", "look"]["text"]
    assert "German" in by["languages", "ok"]["text"]


def test_doctor_goes_on_after_a_file_that_cannot_be_read(place, capsys):
    (place / "in").mkdir()
    (place / "in/a.csv").write_text('question,answer\n"open,a\n')
    (place / "in/b.jsonl").write_text('{"question": "Q", "answer": "A"}\n')
    found, by = doctored(capsys, "in")
    assert "broken CSV" in by["file of a.csv", "bad"]["text"]
    assert (found["files"], found["report"]["usable"]) == (["b.jsonl"], 1)
    found, by = doctored(capsys, "in/a.csv")
    assert (found["report"], "broken CSV" in by["file", "bad"]["text"]) == (None, True)
