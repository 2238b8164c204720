"""Texts for users are plain English, by the checks of `language.py`.

`language_exceptions.txt` lists what is not clean yet; it only shrinks. `python tests/laws/test_language.py` removes lines
of files that are clean by now.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from language import (
    ROOT,
    find_hints_without_a_verb,
    find_long_sentences,
    find_words,
    read_docstrings,
    read_messages,
    strip_markdown,
    strip_template,
)

LIST = Path(__file__).with_name("language_exceptions.txt")
GENERATED = ("docs/reference/", "docs/tutorials/stories.md", "docs/log/")
"""Made from the code, or logs of measurements."""


def list_files(*patterns: str) -> list[Path]:
    return sorted({file for pattern in patterns for file in ROOT.glob(pattern)})


def is_written(file: Path) -> bool:
    return not file.relative_to(ROOT).as_posix().startswith(GENERATED)


PAGES = [
    f for f in list_files("*.md", "docs/**/*.md", "packages/*/README.md", "packages/*/CHANGELOG.md") if is_written(f)
]
# Help, settings and errors, as they are shown.
SHOWN = list_files("docs/reference/cli.md", "docs/reference/settings.md", "docs/reference/errors.md")
MODULES = list_files("packages/*/src/**/*.py")
TEMPLATES = list_files("packages/backpropagate/src/backpropagate/ui/templates/**/*.html")


def check_words(read: Callable[[str], str]) -> Callable[[str], Iterator[str]]:
    return lambda text: find_words(read(text))


CHECKS: dict[str, tuple[list[Path], Callable[[str], Iterator[str]]]] = {
    "words": ([*PAGES, *SHOWN], check_words(strip_markdown)),
    "words of docstrings": ([*MODULES, *list_files("benchmarks/**/*.py")], check_words(read_docstrings)),
    "words of errors": (MODULES, check_words(lambda text: "\n".join(read_messages(text)))),
    "words of the web page": (TEMPLATES, check_words(strip_template)),
    "long sentences": (PAGES, find_long_sentences),
    "hints": (MODULES, find_hints_without_a_verb),
}


def find_faults(kind: str) -> dict[str, list[str]]:
    """Faults by file; files without any are left out."""
    files, check = CHECKS[kind]
    found = {f.relative_to(ROOT).as_posix(): list(check(f.read_text(encoding="utf-8"))) for f in files}
    return {name: faults for name, faults in found.items() if faults}


def read_exceptions() -> set[tuple[str, str]]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return {tuple(line.split(": ", 1)) for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("kind", CHECKS)
def test_texts_are_plain(kind):
    excepted = {name for listed, name in read_exceptions() if listed == kind}
    faults = find_faults(kind)
    new = {name: found for name, found in faults.items() if name not in excepted}
    assert not new, "\n".join(f"{name}: {fault}" for name, found in new.items() for fault in found)
    clean = excepted - set(faults)
    assert not clean, f"clean by now; run python tests/laws/test_language.py: {sorted(clean)}"


def test_exceptions_are_of_a_known_kind():
    assert {kind for kind, _ in read_exceptions()} <= set(CHECKS)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Mend the file.", True),
        ("The mended file", True),
        ("A way out is named.", True),
        ("Rows beside it", True),
        ("What a training takes of a card", True),
        ("The model card has it.", False),
        ("A training run recommends it.", False),
        ("The behaviour is recognised.", True),
        ("Otherwise, raise the precision; it comprises noise.", False),
    ],
)
def test_a_word_of_the_left_column_is_seen(text, seen):
    assert bool(list(find_words(text))) is seen


def test_a_long_sentence_is_seen():
    words = " ".join(["word"] * 26)
    assert list(find_long_sentences(f"Short one. {words.capitalize()}."))
    assert not list(find_long_sentences(f"{' '.join(['word'] * 25)}.\n\n```text\n{words} {words}\n```\n"))
    assert list(find_long_sentences(f"| a | {words} |"))


def test_a_hint_without_a_verb_is_seen():
    assert list(find_words(read_docstrings('"""Mend the card beside it."""'))) != []
    assert not list(find_words(read_docstrings("x = 'mend'")))
    assert list(find_hints_without_a_verb('raise E("x", fix="The file is wrong")'))
    assert not list(find_hints_without_a_verb('raise E("x", fix="Fix the file")'))
    assert not list(find_hints_without_a_verb("raise E('x', fix=f'Name it: {name}')"))


def write_exceptions() -> None:
    """Take away what is clean; add nothing unless the list is empty."""
    faulty = {(kind, name) for kind in CHECKS for name in find_faults(kind)}
    known = read_exceptions() if LIST.exists() else faulty
    head = "# Not yet plain, by kind of check: this list only shrinks. See test_language.py.\n"
    LIST.write_text(head + "".join(f"{kind}: {name}\n" for kind, name in sorted(known & faulty)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_exceptions())
