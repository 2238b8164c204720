"""The tokenizer as a GGUF wants it, read from the tokenizer's own JSON files.

No tokenizer is ever *loaded*: transformers rebuilds a tokenizer by the model's type and may change its splitting rule,
while the files say what the model was trained with. The token list, types and special tokens follow llama.cpp's
converter (``get_vocab_base``, ``_set_vocab_gpt2``); the special tokens come from gguf-py's `SpecialVocab`.

One thing is decided differently on purpose: the end-of-sequence token is the one that ends an assistant's turn in the
chat template, since a GGUF whose EOS is another token never stops talking.

Two kinds of vocabulary are written: byte-level BPE (GPT-2's), and SentencePiece's BPE with bytes for what it lacks
(`bp_export.tokenizer.sentencepiece`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from bp_data.templates.engine import ChatTemplate, leave_undefined, remove_generation_marks
from bp_data.templates.reader import SpecialTokens, read_special_tokens, read_template_files
from bp_data.templates.render_hashes import find_server_variables
from bp_export.errors import TokenizerUnsupportedError
from bp_export.tokenizer.pre import recognise_pre
from bp_export.tokenizer.sentencepiece import ADDED_SCORE, UNUSED_SCORE, Piece, read_pieces, read_space_prefix

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# Added tokens that some models do not mark as special, and that are control tokens all the same.
_CONTROL_LOOKS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_CONTROL_NAMES = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All that a GGUF says about a tokenizer."""

    tokens: Sequence[str]
    """By id; ids that the model has and the tokenizer lacks are ``[PADn]``."""
    types: Sequence[int]
    """By id: gguf's ``TokenType``."""
    pre: str
    """llama.cpp's name of the splitting rule."""
    special: SpecialVocab
    """Merges, special ids, whether to add them, chat template."""
    turn_end: int | None
    """Id of the token that ends an assistant's turn, where the template shows it."""
    template: ChatTemplate | None
    """The folder's chat template, as training renders it; None without one."""
    space_prefix: bool | None
    """The tokenizer's ``add_prefix_space``, where it says so."""
    scores: Sequence[float] | None = None
    """By id, for SentencePiece vocabularies; None for byte-level ones."""
    has_space_prefix: bool = True
    """Whether a SentencePiece vocabulary puts a space before a text."""
    notes: tuple[str, ...] = ()
    """Tokens of the tokenizer that are left out."""

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it as the converter does, in its order."""
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(
    folder: Path,
    *,
    vocab_size: int | None,
    model_config: Mapping[str, Any],
    pre: str | None = None,
    base: Path | None = None,
    is_trained: bool = False,
) -> Vocabulary:
    """Read the tokenizer in a folder.

    Args:
        folder: Holds ``tokenizer.json``, and perhaps ``tokenizer_config.json`` and ``chat_template.jinja``.
        vocab_size: Rows of the model's embedding; None for as many as there are tokens.
        model_config: The model's ``config.json``; its special ids fill the tokenizer's gaps.
        pre: llama.cpp's name of the splitting rule, instead of recognising it.
        base: The base model's folder. Where it has a tokenizer, its splitting rule counts: a framework that saves a
            tokenizer next to an adapter may have rebuilt the rule, while the model learned the base's.
        is_trained: Whether the template must render chats as at training, whatever llama.cpp sets by itself: thinking
            on (Qwen3.5), the date of the day (Llama 3.1).

    Raises:
        TokenizerUnsupportedError: Files missing or damaged, not a byte-level BPE, or more tokens than the model has.
        PreTokenizerUnknownError: The splitting rule is not in the table and ``pre`` is None.
    """
    tokenizer = _read_tokenizer(_require_fast(folder))
    if tokenizer["model"].get("byte_fallback"):
        return _read_sentencepiece(folder, tokenizer, vocab_size, model_config, pre, is_trained=is_trained)
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    added = _read_added(config, tokenizer)
    by_id = {int(i): token for token, i in tokenizer["model"]["vocab"].items()}
    by_id.update({i: str(entry["content"]) for i, entry in added.items()})
    size = vocab_size or max(by_id) + 1
    notes = _leave_out_rowless(folder, by_id, added, size)
    entries = [_to_entry(i, by_id.get(i), added.get(i)) for i in range(size)]
    special = _read_special(folder, model_config, size)
    template = _read_template(folder, special, added, is_trained=is_trained)
    turn_end = _set_turn_end(special, template, {token: i for i, token in by_id.items()})
    if pre is None:
        of_base = base is not None and (base / TOKENIZER_FILE).is_file()
        ruling = base if base is not None and of_base else folder
        pre = recognise_pre(_read_tokenizer(ruling) if of_base else tokenizer, ruling / TOKENIZER_FILE)
    tokens, types = [token for token, _ in entries], [kind for _, kind in entries]
    return Vocabulary(tokens, types, pre, special, turn_end, template, config.get("add_prefix_space"), notes=notes)


def _read_sentencepiece(
    folder: Path,
    tokenizer: Mapping[str, Any],
    vocab_size: int | None,
    model_config: Mapping[str, Any],
    pre: str | None,
    *,
    is_trained: bool,
) -> Vocabulary:
    """As ``_create_vocab_sentencepiece`` of llama.cpp's converter; tokens that only tokenizer.json adds count too."""
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    pieces = read_pieces(folder, tokenizer)
    added = _read_added(config, tokenizer)
    told = {int(i) for i in config.get("added_tokens_decoder") or {}}
    for i, entry in added.items():
        text, kind = _to_entry(i, str(entry["content"]), entry)
        if i in told or i not in pieces or pieces[i].text != text or _has_become_control(kind, pieces[i].kind):
            pieces[i] = Piece(text, ADDED_SCORE, kind)
    size = vocab_size or max(pieces) + 1
    notes = _leave_out_rowless(folder, {i: str(entry["content"]) for i, entry in added.items()}, added, size)
    unused = int(TokenType.UNUSED)
    listed = [pieces.get(i) or Piece(f"[PAD{i}]", UNUSED_SCORE, unused) for i in range(size)]
    special = _read_special(folder, model_config, size, load_merges=False)
    template = _read_template(folder, special, added, is_trained=is_trained)
    turn_end = _set_turn_end(special, template, {piece.text: i for i, piece in enumerate(listed)})
    return Vocabulary(
        tokens=[piece.text for piece in listed],
        types=[piece.kind for piece in listed],
        pre=pre or "default",
        special=special,
        turn_end=turn_end,
        template=template,
        space_prefix=config.get("add_prefix_space"),
        scores=[piece.score for piece in listed],
        has_space_prefix=True if pre else read_space_prefix(tokenizer),
        notes=notes,
    )


def _has_become_control(kind: int, before: int) -> bool:
    """Whether a piece of the text is a control token now; the unknown token is one of its own kind."""
    return kind == int(TokenType.CONTROL) and before == int(TokenType.NORMAL)


def _leave_out_rowless(
    folder: Path, tokens: dict[int, str], added: dict[int, Mapping[str, Any]], size: int
) -> tuple[str, ...]:
    """Take out special tokens past the model's rows, such as a pad token that was added and never trained on.

    The model has no vector for them, so no prompt can hold one.

    Raises:
        TokenizerUnsupportedError: Other tokens are past the rows too.
    """
    rowless = {i: token for i, token in tokens.items() if i >= size}
    if not rowless:
        return ()
    if words := [i for i in rowless if i not in added or _to_entry(i, rowless[i], added[i])[1] != TokenType.CONTROL]:
        raise TokenizerUnsupportedError(
            f"{folder} has token {max(words)}, and the model has only {size} tokens",
            cause="the tokenizer was extended, or belongs to another model",
        )
    for i in rowless:
        del tokens[i], added[i]
    named = ", ".join(f"{token} ({i})" for i, token in sorted(rowless.items())[:5])
    return (f"the model has no row for {len(rowless)} special tokens, which are left out: {named}",)


def _require_fast(folder: Path) -> Path:
    slow = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
    if slow and not (folder / TOKENIZER_FILE).is_file():
        raise TokenizerUnsupportedError(
            f"{folder} has {slow[0]} and no {TOKENIZER_FILE}",
            fix='Convert it: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        )
    return folder


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    tokenizer = _read_json(folder / TOKENIZER_FILE)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise TokenizerUnsupportedError(f"{folder / TOKENIZER_FILE} holds no vocabulary of the BPE kind")
    if model.get("type", "BPE") != "BPE" or not (model.get("byte_fallback") or _is_byte_level(tokenizer)):
        raise TokenizerUnsupportedError(
            f"{folder / TOKENIZER_FILE} is no byte-level BPE, and no SentencePiece BPE with bytes",
            cause="Unigram and WordPiece vocabularies are not written",
        )
    return tokenizer


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    steps = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in steps.get("pretokenizers", [steps]))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise TokenizerUnsupportedError(f"{file} cannot be read", cause=str(error)) from error
    except ValueError as error:
        raise TokenizerUnsupportedError(f"{file} is not JSON", cause=str(error)) from error
    if not isinstance(data, dict):
        raise TokenizerUnsupportedError(f"{file} is not a JSON object")
    return data


def _read_added(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Added tokens by id, from both files; the tokenizer's own file counts where they differ."""
    added = {int(i): entry for i, entry in (config.get("added_tokens_decoder") or {}).items()}
    added.update({int(entry["id"]): entry for entry in tokenizer.get("added_tokens") or []})
    return added


def _to_entry(index: int, token: str | None, added: Mapping[str, Any] | None) -> tuple[str, int]:
    """A token's text and type; ids without a token are padding."""
    if token is None:
        return f"[PAD{index}]", int(TokenType.UNUSED)
    if added is None:
        return token, int(TokenType.NORMAL)
    if added.get("special") or _looks_like_control(token):
        return token, int(TokenType.CONTROL)
    # Added tokens are matched against the text as it stands, where SentencePiece's mark for a space is a space.
    return token.replace("\u2581", " "), int(TokenType.USER_DEFINED)


def _looks_like_control(token: str) -> bool:
    return token in _CONTROL_NAMES or any(token.startswith(a) and token.endswith(b) for a, b in _CONTROL_LOOKS)


def _read_special(
    folder: Path, model_config: Mapping[str, Any], size: int, *, load_merges: bool = True
) -> SpecialVocab:
    """gguf-py's reading of the folder, with the model's own ids where the tokenizer names none."""
    special = SpecialVocab(folder, load_merges=load_merges)
    for kind in [kind for kind, i in special.special_token_ids.items() if i >= size]:
        del special.special_token_ids[kind]
    for kind in _SPECIAL_KINDS:
        value = model_config.get(f"{kind}_token_id")
        if kind not in special.special_token_ids and isinstance(value, int) and 0 <= value < size:
            special.special_token_ids[kind] = value
    return special


def _read_template(
    folder: Path, special: SpecialVocab, added: Mapping[int, Any], *, is_trained: bool
) -> ChatTemplate | None:
    """The folder's chat template, also put among what the GGUF says, for llama.cpp without generation marks."""
    files = read_template_files(folder)
    if files is None:
        special.chat_template = None
        return None
    names = [str(entry["content"]) for entry in added.values()]
    template = ChatTemplate(files.texts, SpecialTokens(read_special_tokens(folder), names), source=files.source)
    unset = find_server_variables(template) if is_trained else []
    texts = {name: leave_undefined(remove_generation_marks(text), unset) for name, text in files.texts.items()}
    named = [{"name": name, "template": text} for name, text in texts.items()]
    special.chat_template = texts["default"] if list(texts) == ["default"] else named
    return template


def _set_turn_end(special: SpecialVocab, template: ChatTemplate | None, ids: Mapping[str, int]) -> int | None:
    end = None if template is None or template.terminator is None else ids.get(template.terminator)
    if end is not None:
        special.special_token_ids["eos"] = end
    return end
