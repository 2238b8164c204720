"""What `shared/STYLE.md` asks of texts for users, as checks: words, lengths of sentences, first words of hints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_WORDS = 25

# What is not written, and what is written instead.
WORDS = {
    r"ways? out": "fix, hint",
    r"mend(s|ed|ing)?": "fix, repair",
    r"trainings": "training runs",
    r"an? training(?= (is|was|that|which|of|takes|has|on|in|ends|goes|with|cannot|can)\b)": "a training run",
    r"go(es|ing)? on(?= (with|from|as|for|to)\b)": "resume, continue",
    r"anew": "from scratch, again",
    r"learnt": "learned, trained on",
    r"(is|are|was|were|be|been) told": "shows, reports, logs",
    r"asked for": "requested, set",
    r"(was|were|is|are) wanted": "requested, set",
    r"sa(id|ys?) no": "failed",
    r"refus(e|es|ed|ing|al|als)": "reject; not supported",
    r"(lies|lie|lay) (at|in|under|beside)": "is in, is at",
    r"stands? in": "is in",
    r"beside": "next to, as well as",
    r"rehears(al|als|e|es|ed)": "preflight",
    r"(?<!model )(?<!sound )(?<!post)(?<!model-)cards?(?! of the (model|base))(?!\.(md|json))": "GPU",
    r"score cards?": "scorecard",
    r"(parted|whole) weights": "sharded, unsharded weights",
    r"(in|of|for) (a|the) nights?": "queue",
    r"in (its|their) turns?": "alternating",
    r"(?<!--)mode full": "full fine-tuning",
    r"all weights(?! of)": "full fine-tuning",
    r"held[- ]out rows": "validation set, test set",
    r"carr(y|ies) (no )?loss": "tokens trained on",
    r"thereby|wherein|whereof|hereby|nought|betwixt|whilst|amongst|needs must|lest": "plain English",
    r"(colour|behaviour|favour|honour|neighbour)\w*": "American spelling",
    r"(licence|licences|cancelled|cancelling|labelled|labelling|modelled|programme|grey|centre)": "American spelling",
    r"\w+(alise|nise|rise|mise|lyse)(d|s|r|rs)?(?<!otherwise)(?<!raise)(?<!raises)(?<!raised)(?<!rise)(?<!promise)"
    r"(?<!promises)(?<!promised)(?<!arise)(?<!arises)(?<!compromise)(?<!compromised)(?<!surprise)(?<!surprised)"
    r"(?<!premise)(?<!premises)(?<!enterprise)(?<!noise)(?<!precise)(?<!comprise)(?<!comprises)(?<!surprises)"
    r"(?<!rises)(?<!likewise)(?<!finish)": "American spelling",
}
_WORDS = {pattern: re.compile(rf"\b({pattern})\b", re.IGNORECASE) for pattern in WORDS}

VERBS = frozenset(
    """
    accept adapt add agree allow apply ask attach avoid await back build call change check choose clear close combine compare continue convert
    copy correct count create cut decrease delete do download drop edit enable end export extend fill find fix follow free
    get give go grant group hide import increase inspect install hold improve join keep launch leave let limit list load log look lower
    make map mark measure merge mount move name narrow omit open order overwrite pack pass pick plan point prepare press protect prove pull put queue quote raise read
    rebuild reduce reinstall remove rename repair repeat replace replay report rerun reset restore resume retry return rewrite run save say
    see select send set shorten show shut sign skip split start stay stop switch take tell test train truncate try turn type unpack unset
    update upgrade upload use validate verify wait watch write
    """.split()  # noqa: SIM905  # a table of words
)


def find_words(text: str) -> Iterator[str]:
    """Each word that is not written, with what to write."""
    for pattern, found in _WORDS.items():
        if match := found.search(text):
            yield f"{match[0]!r}: write {WORDS[pattern]}"


def strip_markdown(text: str) -> str:
    """Prose alone: no code, no targets of links, no HTML, no front matter of directives."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "Code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"<https?://[^>]*>", "link", text)


def read_sentences(text: str) -> Iterator[str]:
    """Sentences of Markdown: of paragraphs, list items, headings and table cells."""
    block: list[str] = []
    for line in [*strip_markdown(text).splitlines(), ""]:
        bare = line.strip()
        if bare.startswith("|"):
            yield from (part for cell in bare.strip("|").split("|") for part in _split(cell))
            continue
        starts = re.match(r"([-*]|\d+\.|#+|>) ", bare)
        if block and (not bare or starts):
            yield from _split(" ".join(block))
            block = []
        if bare:
            block.append(bare[starts.end() :] if starts else bare)


def _split(text: str) -> Iterator[str]:
    for part in re.split(r"(?<=[.!?])[\"')*_]*\s+(?=[A-Z`*_\"'(\d])|(?<=:)\s+(?=[A-Z])", text):
        if part.strip():
            yield part.strip()


def find_long_sentences(text: str) -> Iterator[str]:
    """Sentences of more than 25 words."""
    for sentence in read_sentences(text):
        count = len(re.findall(r"[\w'’.,×%/-]*\w[\w'’.,×%/-]*", sentence))
        if count > MOST_WORDS:
            yield f"{count} words: {sentence}"


def read_hints(source: str) -> Iterator[str]:
    """Every `fix=` and `default_fix =` of a module that starts with plain text."""
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.keyword) and node.arg == "fix") or (
            isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "default_fix" for t in node.targets)
        ):
            value = node.value
        else:
            continue
        if isinstance(value, ast.JoinedStr) and value.values:
            value = value.values[0]
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value:
            yield value.value


def find_hints_without_a_verb(source: str) -> Iterator[str]:
    """Hints whose first word is no verb."""
    for hint in read_hints(source):
        first = re.match(r"[A-Za-z'’]+", hint)
        if first and first[0].lower() not in VERBS and not hint.startswith("{"):
            yield f"starts with no verb: {hint}"


def read_messages(source: str) -> Iterator[str]:
    """Plain parts of what a module says: arguments of raised errors, warnings and findings, and hints."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name.endswith(("Error", "Finding", "Warning", "Check", "Interrupted")) or name in {
            "warning",
            "info",
            "setting",
        }:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                    yield part.value


def read_docstrings(source: str) -> str:
    """The docstrings of a module, without code in backticks; the Hub's model cards are cards there."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [n.value.value for n in nodes if isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)]
    text = re.sub(r"`+[^`]*`+|(?m:^ +\w+:)", "Code", "\n".join(texts))
    return re.sub(r"\bcards?\b", "model card", text) if CARDS.search(source) else text


CARDS = re.compile(r"[Ss]corecard|model_card|license|hub")
"""Modules that speak of cards which are no GPUs."""


def strip_template(text: str) -> str:
    """The words that a Jinja template shows."""
    text = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}|<script.*?</script>|<style.*?</style>", " ", text, flags=re.DOTALL)
    shown = re.findall(r'(?:title|aria-label|placeholder|alt)="([^"]*)"', text)
    return " ".join([re.sub(r"<[^>]*>", " ", text), *shown])
