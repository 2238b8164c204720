"""The stream's tasks as tokens, from text that Debian packages ship; the text itself is never committed.

    uv run python benchmarks/continual/build_data.py --model FOLDER --out stream.npz [--debs FOLDER]

Needs a Debian or Ubuntu with its package index (apt-get update): wordnet-base and dict-foldoc are downloaded and unpacked
(not installed), and one-line descriptions come from ``apt-cache dumpavail``. Each row is a prompt that ends in
``Answer:`` and a label word that is one token. Equal texts never stand on both sides of the split.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

TEXT_TOKENS = 30
COMMON_TOKENS = 4096  # ids kept in the vocabulary whether or not the texts have them

LEXICOGRAPHER = {
    "noun": {
        5: "animal",
        6: "artifact",
        8: "body",
        13: "food",
        15: "location",
        18: "person",
        20: "plant",
        27: "substance",
    },
    "verb": {
        30: "change",
        32: "speech",
        35: "contact",
        36: "creation",
        37: "thought",
        38: "motion",
        40: "ownership",
        41: "social",
    },
}
SECTIONS = {
    "games": "games",
    "science": "science",
    "sound": "audio",
    "graphics": "graphics",
    "fonts": "fonts",
    "web": "web",
    "math": "math",
    "mail": "mail",
}
SUBJECTS = {
    "language": "language",
    "networking": "networking",
    "programming": "programming",
    "operating system": "system",
    "company": "company",
    "hardware": "hardware",
}
TASKS = (
    ("nouns", "What kind of thing is this?", 200, 50),
    ("packages", "Which section is this program in?", 200, 50),
    ("verbs", "What kind of action is this?", 200, 50),
    ("terms", "Which subject is this term from?", 120, 40),
)

Found = Iterator[tuple[str, str]]
"""Text and label word."""


def read_glosses(folder: Path, part: str) -> Found:
    """WordNet: gloss without its examples, and the word for its lexicographer's file (lexnames.5WN)."""
    for line in (folder / f"usr/share/wordnet/data.{part}").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        label = LEXICOGRAPHER[part].get(int(head.split()[1]))
        text = re.sub(r';?\s*"[^"]*"?', "", gloss).strip(" ;")
        if label and len(text) > 15:
            yield text, label


def read_packages() -> Found:
    """One-line descriptions of packages that people use, and their section."""
    dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for entry in dump.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Section|Description(?:-en)?): (.*)$", entry, re.MULTILINE))
        name, label = fields.get("Package", ""), SECTIONS.get(fields.get("Section", "").rpartition("/")[2])
        text = fields.get("Description-en") or fields.get("Description") or ""
        if label and len(text) > 15 and not re.search(r"-(dev|doc|data|dbg|common|dbgsym)$|^lib", name):
            yield text, label


def read_terms(folder: Path) -> Found:
    """FOLDOC: the first sentence of terms with exactly one subject tag."""
    raw = gzip.decompress((folder / "usr/share/dictd/foldoc.dict.dz").read_bytes()).decode("utf-8", "replace")
    for body in re.findall(r"\n\n   (<[^\n]*(?:\n(?!\n\S).*)*)", raw):
        tags = re.match(r"<([^>]*)>\s*", body)
        label = SUBJECTS.get(tags[1]) if tags else None
        text = re.sub(r"[{}]|\(\d{4}-\d\d-\d\d\)", "", " ".join(body[tags.end() :].split())) if tags else ""
        if label and len(text) > 30:
            yield text, label


def unpack(debs: Path | None, folder: Path) -> None:
    """The two packages' files under ``folder``."""
    if debs is None:
        subprocess.run(["apt-get", "download", "-qq", "wordnet-base", "dict-foldoc"], cwd=folder, check=True)
        debs = folder
    for name in ("wordnet-base", "dict-foldoc"):
        subprocess.run(["dpkg-deb", "-x", next(debs.glob(f"{name}_*.deb")), folder], check=True)


def choose(found: Found, train: int, test: int) -> tuple[list[str], dict[str, tuple[list[str], list[str]]]]:
    """Label words in order, and for each its texts to train and to test on, drawn by the texts' hashes."""
    by_label: dict[str, set[str]] = {}
    for text, label in found:
        by_label.setdefault(label, set()).add(text)
    seen: dict[str, int] = {}
    for texts in by_label.values():
        for text in texts:
            seen[text.lower()] = seen.get(text.lower(), 0) + 1
    chosen = {}
    for label, texts in sorted(by_label.items()):
        own = sorted((t for t in texts if seen[t.lower()] == 1), key=lambda t: hashlib.sha256(t.encode()).hexdigest())
        if len(own) < train + test:
            raise SystemExit(f"{label} has {len(own)} texts; {train + test} are needed")
        chosen[label] = own[:train], own[train : train + test]
    return sorted(chosen), chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(options.debs, folder)
        sources = (read_glosses(folder, "noun"), read_packages(), read_glosses(folder, "verb"), read_terms(folder))
        picked = [choose(source, train, test) for source, (_, _, train, test) in zip(sources, TASKS, strict=True)]
    rows, tasks = [], []
    for number, ((task, question, _, _), (labels, texts)) in enumerate(zip(TASKS, picked, strict=True)):
        ids = [encode(f" {label}") for label in labels]
        if any(len(found) != 1 for found in ids):
            raise SystemExit(f"{task}: a label is no single token: {dict(zip(labels, ids, strict=True))}")
        tasks.append({"name": task, "labels": labels, "ids": [found[0] for found in ids]})
        head, tail = encode(f"{question}\nText:"), encode("\nAnswer:")
        for place, label in enumerate(labels):
            for is_test, side in enumerate(texts[label]):
                rows += [(number, place, is_test, head + encode(f" {t}")[:TEXT_TOKENS] + tail) for t in side]
    random.Random(0).shuffle(rows)
    kept = sorted(
        {i for row in rows for i in row[3]} | {i for t in tasks for i in t["ids"]} | set(range(COMMON_TOKENS))
    )
    new = {old: place for place, old in enumerate(kept)}
    for task in tasks:
        task["ids"] = [new[i] for i in task["ids"]]
    np.savez_compressed(
        options.out,
        facts=np.frombuffer(json.dumps({"tasks": tasks}).encode(), np.uint8),
        kept=np.array(kept, np.int32),
        tokens=np.array([new[i] for row in rows for i in row[3]], np.uint16),
        lengths=np.array([len(row[3]) for row in rows], np.uint8),
        task=np.array([row[0] for row in rows], np.uint8),
        label=np.array([row[1] for row in rows], np.uint8),
        is_test=np.array([row[2] for row in rows], np.uint8),
    )
    mean = np.mean([len(row[3]) for row in rows])
    print(
        f"{len(rows)} rows, {mean:.1f} tokens on average, {len(kept)} tokens kept, {options.out.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
