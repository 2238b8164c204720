"""Fuzzing by coverage for hours: Atheris drives the strategies of ``test_data_fuzz.py``.

    uv run --with atheris python packages/bp-data/tests/fuzz_data.py masks -max_total_time=900

The targets are rows, files, masks, compared and overflow; the options are libFuzzer's, after a folder for the corpus where one is
wanted. A failing input is printed and kept as a file ``crash-…``; what it stands for goes into the tests.
"""

import importlib.util
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bp_data"]):
    _spec = importlib.util.spec_from_file_location("bp_data_fuzz", Path(__file__).with_name("test_data_fuzz.py"))
    tests = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(tests)

from hypothesis import given, settings


def targets(folder):
    """Each target's strategy and check."""
    folder.joinpath("models").mkdir()
    encoders = tests.make_encoders(lambda family, template: make_model(folder / "models", family, template))
    qwen = make_model(folder / "models", "chatml", tests.families.QWEN)
    return {
        "rows": (tests.MANY_ROWS, lambda rows: tests.check_rows(encoders, rows)),
        "files": (tests.FILES, lambda made: tests.check_file(folder, made)),
        "masks": (tests.CHATS, lambda chat: tests.check_masks(encoders, chat)),
        "compared": (tests.COMPARED, lambda rows: tests.check_compared(folder, qwen, rows)),
        "overflow": (tests.LONG_ROWS, tests.check_overflow),
    }


def make_model(folder, family, template):
    found = folder / f"{family}{abs(hash(template))}"
    return found if found.exists() else tests.families.write_model(found, family, template)


def write_seeds(folder):
    """Inputs long enough for a strategy to draw from; from an empty one the fuzzer would not find its way."""
    chance = random.Random(1)
    folder.mkdir()
    for place in range(60):
        (folder / f"seed{place}").write_bytes(chance.randbytes(chance.choice([512, 2048, 8000])))
    return str(folder)


def main():
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += [write_seeds(Path(folder) / "seeds"), "-max_len=8192", "-len_control=0"]
        strategy, check = targets(Path(folder))[name]
        fuzzed = settings(database=None, deadline=None)(given(strategy)(check))
        atheris.Setup(sys.argv, fuzzed.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
