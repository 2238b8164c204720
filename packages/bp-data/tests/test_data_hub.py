"""Data sets by name: the real client of the Hub against a Hub on this machine, and folders laid out like one."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bp_data import fetch_dataset, looks_like_hub_name, read_rows
from bp_data.errors import (
    DatasetEmptyError,
    DatasetFormatUnsupportedError,
    DatasetPartUnknownError,
    DatasetUnreachableError,
)
from bp_data.hub import _prune

pytest.importorskip("datasets")
_spec = importlib.util.spec_from_file_location("bp_data_fake_hub", Path(__file__).with_name("fake_hub.py"))
fake_hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_hub)

# The client reads its settings once, when it is imported, so that each Hub has a process of its own.
FETCH = """
import json, sys
from pathlib import Path
from bp_data import fetch_dataset, read_rows
from bp_runs.errors import CodedError

for asked in json.loads(sys.argv[2]):
    try:
        found = fetch_dataset(asked.pop("name"), Path(sys.argv[1]), **asked)
        rows = [(row.source, row.data["completion"]) for row in read_rows(found.path)]
        print(json.dumps([found.subset, found.split, found.commit, rows]))
    except CodedError as error:
        print(json.dumps([error.code, str(error), error.fix]))
if len(sys.argv) > 3:
    from datasets.config import HF_UPDATE_DOWNLOAD_COUNTS
    from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
    assert HF_HUB_DISABLE_TELEMETRY and not HF_UPDATE_DOWNLOAD_COUNTS, "usage is reported"
"""


def fetch_all(url, folder, asked, *more):
    environ = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf")}
    environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", FETCH, str(folder / "kept"), json.dumps(asked), *more]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("what was fetched before is used" in done.stderr) == (url == NOWHERE)
    return [json.loads(line) for line in done.stdout.splitlines()]


NOWHERE = "http://127.0.0.1:9"
CHATS = {"name": "owner/chats"}


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """What the Hub gave, and what is known without it afterwards."""
    folder = tmp_path_factory.mktemp("hub")
    asked = [
        CHATS,
        {**CHATS, "revision": "v1"},
        {**CHATS, "subset": "de"},
        {**CHATS, "split": "test"},
        {**CHATS, "split": "validation"},
        {**CHATS, "subset": "fr"},
        {**CHATS, "revision": "v9"},
        {"name": "owner/none"},
        {"name": "owner/gated"},
        {**CHATS, "revision": fake_hub.OLD},
    ]
    with fake_hub.serve() as (url, seen):
        online = fetch_all(url, folder, asked, "and reports no usage")
        before = len(seen)
        online += fetch_all(url, folder, asked[-1:])
        assert len(seen) == before, "a commit that is here is not asked for again"
    later = [CHATS, {**CHATS, "offline": True}, {"name": "owner/none"}, {"name": "owner/none", "offline": True}]
    return online, fetch_all(NOWHERE, folder, later), seen


def test_a_split_of_the_hub_is_fetched_at_one_commit_and_read_by_our_readers(fetched):
    newest, old, german, test, *_ = fetched[0]
    assert newest == ["en", "train", fake_hub.NEW, [["en/train-0.jsonl", "new 0"], ["en/train-1.jsonl", "new 1"]]]
    assert old == ["en", "train", fake_hub.OLD, [["train-0.jsonl", "old"]]]
    assert fetched[0][9] == fetched[0][10] == old
    assert german == ["de", "train", fake_hub.NEW, [["de.jsonl", "d"]]]
    assert test == ["en", "test", fake_hub.NEW, [["test.jsonl", "t"]]]
    assert not any("weights.bin" in path for path in fetched[2]), "only the split's files are fetched"


def test_what_the_hub_does_not_have_is_told_with_what_it_has(fetched):
    split, subset, revision, name, gated = fetched[0][4:9]
    assert split[0] == subset[0] == "INPUT_DATASET_PART_UNKNOWN"
    assert "train, test" in split[1]
    assert split[2] == 'Name one of them: data.split="train"'
    assert "en, de" in subset[1]
    assert revision[0] == name[0] == "INPUT_DATASET_NOT_FOUND"
    assert "v9" in revision[1]
    assert "hf auth login" in name[2]
    assert gated[0] == "DEP_DATASET_ACCESS"


def test_without_the_hub_what_was_fetched_is_used_and_the_rest_is_an_error(fetched):
    kept, offline, unreachable, unknown = fetched[1]
    assert kept == offline == fetched[0][0]
    assert unreachable[0] == unknown[0] == "DEP_DATASET_UNREACHABLE"
    assert "offline" in unknown[1]


# Two processes that have everything imported before the first of them asks.
TWICE = """
import os, sys
from pathlib import Path
import bp_data.hub, datasets, huggingface_hub

child = os.fork()
found = bp_data.hub.fetch_dataset("owner/chats", Path(sys.argv[1]))
names = sorted(file.name for file in found.path.rglob("*.jsonl"))
print(found.commit, names, flush=True)
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_two_processes_that_want_the_same_fetch_it_once(tmp_path):
    with fake_hub.serve(delay=1.0) as (url, _):
        environ = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TWICE, str(tmp_path / "kept")],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 2 * [f"{fake_hub.NEW} ['train-0.jsonl', 'train-1.jsonl']"]
    assert "another process fetches chats; waiting for it" in done.stderr
    (fetched,) = (tmp_path / "kept" / "hub").iterdir()
    assert fetched.name.endswith(fake_hub.NEW)


def test_of_many_commits_the_ones_used_last_stay(tmp_path, caplog):
    caplog.set_level("INFO", "bp_data")
    now, day = time.time(), 24 * 3600
    commits = [tmp_path / f"chats-key-{i}" for i in range(5)]
    for age, folder in zip((9, 3, 2, 0.5, 9), commits, strict=True):
        write(folder, "train.jsonl", "x" * 2**20)
        os.utime(folder, (now - age * day,) * 2)
    _prune(commits[0], tmp_path.glob("chats-key-*"))
    assert {folder.name for folder in tmp_path.iterdir()} == {"chats-key-0", "chats-key-3"}, "the one in use is young"
    assert "chats-key-1, 1.0 MiB" in caplog.text
    write(commits[1], "train.jsonl", "x")
    _prune(commits[1], tmp_path.glob("chats-key-*"))
    assert len(list(tmp_path.iterdir())) == 3, "what was used within a day may be in use"


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


@pytest.fixture
def chats(tmp_path):
    folder = tmp_path / "chats"
    for name in ("en/train-0.jsonl", "en/train-1.jsonl.gz", "en/test.jsonl", "de.jsonl"):
        write(folder, name, json.dumps({"prompt": "Q", "completion": name}) + "\n")
    write(folder, "README.md", fake_hub.CARD.replace("  default: true\n", ""))
    return folder


def test_a_folder_laid_out_like_a_data_set_has_splits_and_subsets(chats, tmp_path):
    def answers(**part):
        return [row.data["completion"] for row in read_rows(fetch_dataset(chats, tmp_path / "kept", **part).path)]

    assert answers(subset="en") == ["en/train-0.jsonl", "en/train-1.jsonl.gz"]
    assert answers(subset="en", split="test") == ["en/test.jsonl"]
    assert answers(subset="de") == ["de.jsonl"]
    with pytest.raises(DatasetPartUnknownError, match="several subsets, and none is named; there are: en, de"):
        answers()
    with pytest.raises(DatasetPartUnknownError, match="no split 'dev'"):
        answers(subset="en", split="dev")
    (chats / "en" / "train-0.jsonl").write_text('{"prompt": "Q", "completion": "changed"}\n')
    before = list((tmp_path / "kept" / "folders").iterdir())
    assert answers(subset="en") == ["changed", "en/train-1.jsonl.gz"], "a change is seen"
    (after,) = (tmp_path / "kept" / "folders").iterdir()
    assert [after] != before, "nothing old is kept"
    made = after.stat().st_mtime_ns
    assert answers(subset="en") == ["changed", "en/train-1.jsonl.gz"]
    assert after.stat().st_mtime_ns == made, "and what is read elsewhere is not made anew"


def test_folders_that_are_no_data_sets(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetEmptyError):
        fetch_dataset(tmp_path / "empty", tmp_path / "kept", split="train")
    write(tmp_path / "pictures", "train/a.png", "x")
    with pytest.raises(DatasetFormatUnsupportedError):
        fetch_dataset(tmp_path / "pictures", tmp_path / "kept", split="train")
    with pytest.raises(DatasetUnreachableError):
        fetch_dataset("owner/never", tmp_path / "kept", offline=True)


def test_without_the_library_the_fix_is_named(chats, tmp_path, monkeypatch):
    for module in ("datasets", "datasets.data_files", "datasets.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in (chats, "owner/chats"):
        with pytest.raises(DatasetFormatUnsupportedError) as caught:
            fetch_dataset(name, tmp_path / "kept", split="test")
        assert "bp-data[hub]" in caught.value.fix


@pytest.mark.parametrize("name", ["owner/chats", "squad", "HuggingFaceH4/ultrachat_200k"])
def test_names_of_data_sets(name):
    assert looks_like_hub_name(name)


@pytest.mark.parametrize(
    "name", ["my_data.jsonl", "a/b/c", "./chats", "../x", "~/x", "a b", "", "data/x.csv.gz", "C:\\x"]
)
def test_names_of_files(name):
    assert not looks_like_hub_name(name)
