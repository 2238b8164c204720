"""Write `bp_export/llama_cpp/classes.json` from the pinned converter itself.

uv run python packages/bp-export/tests/make_llama_cpp_classes.py
"""

import json
from importlib.resources import files

from bp_export.llama_cpp.environment import ensure_converter


def main() -> None:
    status, answer, words = ensure_converter().run("driver", {"task": "classes"})
    assert not status, words
    path = files("bp_export.llama_cpp").joinpath("classes.json")
    lines = [f" {json.dumps(kind)}: {json.dumps(names)}" for kind, names in answer.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print({kind: len(names) for kind, names in answer.items()})


if __name__ == "__main__":
    main()
