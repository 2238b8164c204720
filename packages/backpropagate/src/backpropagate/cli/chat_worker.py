"""The process that answers for the web page: ``python -m backpropagate.cli.chat_worker TARGET [--ollama]``.

It reads a line of JSON for each answer: ``{"messages": [{"role", "content"}, …], "max_tokens", "temperature",
"seed"}``.
It writes lines of JSON: ``{"ready": true}`` first, then ``{"piece": "…"}`` as an answer is made, and ``{"end": true}``;
or ``{"error": {…}}`` as `CodedError.to_dict`. It ends with its standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import orjson

from backpropagate.cli.chat import open_target
from backpropagate.cli.error_output import prepare_process
from bp_export.chat import ChatSession
from bp_export.cli.options import CHAT, read_values
from bp_runs.errors import CodedError


def main(argv: Sequence[str]) -> int:
    """Open the target and answer until the input ends; 1 if it can't be opened."""
    prepare_process()
    target, *rest = argv
    try:
        with open_target(target, read_values(CHAT, {"ollama": "--ollama" in rest})) as session:
            _write({"ready": True})
            for line in sys.stdin.buffer:
                _answer(session, orjson.loads(line))
    except CodedError as error:
        _write({"error": error.to_dict()})
        return 1
    return 0


def _answer(session: ChatSession, asked: dict[str, Any]) -> None:
    options = (asked.get("max_tokens", 512), asked.get("temperature", 0.0), asked.get("seed", 0))
    try:
        for piece in session.stream(asked["messages"], *options):
            _write({"piece": piece})
        _write({"end": True})
    except CodedError as error:
        _write({"error": error.to_dict()})


def _write(found: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
