"""The model card of what is pushed: what it is, what it learned from and how, and the commands that make it again.

Every figure comes from the run's record; what has no record says so. Paths and names of machines are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from bp_export.hub.commands import write_download_commands, write_export_command, write_train_command
from bp_export.hub.license import License
from bp_export.hub.run_record import Origin, is_hub_id, list_changes
from bp_export.local_paths import hide_homes
from bp_runs.record import RunRecord
from bp_runs.redact import redact

Kind: TypeAlias = Literal["adapter", "merged", "gguf"]

PICTURE = "loss.png"
_LIBRARY: Mapping[Kind, str] = MappingProxyType({"adapter": "peft", "merged": "transformers", "gguf": "gguf"})
_RELATION: Mapping[Kind, str] = MappingProxyType({"adapter": "adapter", "merged": "finetune", "gguf": "quantized"})
_WHAT: Mapping[Kind, str] = MappingProxyType(
    {
        "adapter": "a LoRA adapter for",
        "merged": "a fine-tune, with its weights merged, of",
        "gguf": "a fine-tune, as one GGUF file for llama.cpp and Ollama, of",
    }
)
_PACKAGES = ("backpropagate", "bp-export", "torch", "transformers", "peft", "trl", "mlx", "mlx-lm")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made of."""

    repo: str
    """``owner/name``."""
    kind: Kind
    base: str
    """Its Hub id, or a folder's name."""
    license: License
    """The base's."""
    origin: Origin | None
    files: tuple[str, ...]
    has_picture: bool
    artifact: Mapping[str, Any]
    """What the run's record says of the export; empty for an adapter."""

    @property
    def base_id(self) -> str | None:
        """The base's Hub id; None for a folder."""
        return self.base if is_hub_id(self.base) else None

    @property
    def base_name(self) -> str:
        """How the base is called in words."""
        return self.base or "an unnamed model"


def build_card(facts: CardFacts) -> str:
    """The whole README.md, without secrets."""
    parts = [
        *_write_head(facts),
        f"# {facts.repo.rpartition('/')[2]}",
        f"This is {_WHAT[facts.kind]} {_link(facts)}, made with [Backpropagate](https://pypi.org/project/backpropagate/).",
        *_write_use(facts),
        *_write_data(facts),
        *_write_training(facts),
        *_write_parity(facts),
        *_write_reproduce(facts),
        *_write_license(facts),
    ]
    return redact(hide_homes("\n\n".join(parts))) + "\n"


def _write_head(facts: CardFacts) -> Iterator[str]:
    head: dict[str, Any] = {
        "license": facts.license.id,
        "license_name": facts.license.name,
        "license_link": facts.license.link,
        "base_model": facts.base_id,
        "base_model_relation": _RELATION[facts.kind] if facts.base_id else None,
        "library_name": _LIBRARY[facts.kind],
        "pipeline_tag": "text-generation",
        "tags": ["backpropagate", "lora", facts.kind],
    }
    # JSON's values are YAML's too.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value is not None]
    yield "\n".join(["---", *lines, "---"])


def _link(facts: CardFacts) -> str:
    return f"[{facts.base_id}](https://huggingface.co/{facts.base_id})" if facts.base_id else f"`{facts.base_name}`"


def _write_use(facts: CardFacts) -> Iterator[str]:
    yield "## Use"
    if facts.kind == "gguf":
        yield _fence("bash", f"ollama run hf.co/{facts.repo}\nllama-server -hf {facts.repo}")
    elif facts.kind == "merged":
        yield _fence(
            "python", f'from transformers import pipeline\n\nchat = pipeline("text-generation", "{facts.repo}")'
        )
    else:
        yield _fence("python", _write_loading(facts))
        yield "Or as one file for Ollama, without torch:"
        yield _fence("bash", "\n".join(write_download_commands(facts.repo, None if facts.base_id else facts.base)))


def _write_loading(facts: CardFacts) -> str:
    if facts.base_id:
        load = f'AutoPeftModelForCausalLM.from_pretrained("{facts.repo}")'
        return f"from peft import AutoPeftModelForCausalLM\n\nmodel = {load}"
    imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
    base = f'AutoModelForCausalLM.from_pretrained("./{facts.base}")  # which is not on the Hub by that name'
    return f'{imports}\n\nbase = {base}\nmodel = PeftModel.from_pretrained(base, "{facts.repo}")'


def _write_data(facts: CardFacts) -> Iterator[str]:
    yield "## Training data"
    data = facts.origin.record.data if facts.origin else {}
    if not data:
        yield "Not recorded."
        return
    rows = [
        ("name", f"`{data.get('path') if data.get('revision') else PurePath(str(data.get('path', ''))).name}`"),
        ("SHA-256", f"`{data.get('sha256')}`"),
        ("rows", _count_rows(facts.origin.record) if facts.origin else ""),
        ("tokens", f"{data.get('tokens'):,}, of which {data.get('trained_tokens'):,} carry loss"),
        ("chat template", f"{data.get('template')}, SHA-256 `{data.get('template_sha256')}`"),
    ]
    yield _table(("", ""), rows)


def _count_rows(record: RunRecord) -> str:
    """What became of every row; of an older record, what was ready to train on."""
    counts = [f"{record.data.get(key, 0)} {name}" for key, name in _READY.items()]
    return record.describe_rows() or ", ".join(counts)


_READY = {"read": "read", "whole": "whole", "truncated": "truncated", "dropped": "dropped", "heldout": "held out"}


def _write_training(facts: CardFacts) -> Iterator[str]:
    yield "## Training"
    if facts.origin is None:
        yield "Not recorded."
        return
    record = facts.origin.record
    result = {key: record.result.get(key) for key in ("steps", "first_loss", "final_loss", "eval_loss", "best_step")}
    rows = [(key.replace("_", " "), _to_cell(value)) for key, value in result.items() if value is not None]
    if facts.origin.proof:
        rows.append(("proof", facts.origin.proof.summary()))
    yield _table((f"run `{record.run_id}`", record.status), [*rows, *_list_machine(facts.origin)])
    if facts.has_picture:
        first, final = _to_cell(result["first_loss"]), _to_cell(result["final_loss"])
        yield f"![Loss over {len(facts.origin.losses)} steps: from {first} to {final} nats]({PICTURE})"
    yield "Settings that are not at their defaults:"
    yield _table(("setting", "value"), [(f"`{k}`", f"`{_to_cell(v)}`") for k, v in list_changes(record).items()])


def _list_machine(origin: Origin) -> Iterator[tuple[str, str]]:
    model, versions = origin.record.model, origin.record.versions
    if model:
        yield "mode", f"{model.get('mode')}, {model.get('dtype')}"
        yield "parameters", f"{model.get('parameters'):,}, of which {model.get('trainable'):,} trained"
        yield "device", str(model.get("device"))
    yield "versions", ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)


def _write_parity(facts: CardFacts) -> Iterator[str]:
    parity = facts.artifact.get("parity")
    if facts.kind != "gguf" or not parity:
        return
    yield "## Parity"
    if facts.origin and (made := facts.origin.record.describe_artifact(facts.artifact)):
        yield f"The file was made {made}."
    reference = parity.get("reference")
    against = f" with the {reference} of the trained model" if reference else ""
    yield f"The file was loaded in llama.cpp and compared{against}. {parity.get('summary', '')}".rstrip()
    yield _table(("check", "result", ""), [(c["name"], c["result"], c["note"]) for c in parity["checks"]])


def _write_reproduce(facts: CardFacts) -> Iterator[str]:
    yield "## Make it again"
    commands = list(list_commands(facts))
    if not commands:
        yield "There is no record of how it was made."
        return
    yield "From the folder that holds the data:"
    yield _fence("bash", "\n".join(commands))


def list_commands(facts: CardFacts) -> Iterator[str]:
    """The commands that make it again, in their order."""
    train = write_train_command(facts.origin.record) if facts.origin else None
    if train is not None:
        yield "pip install 'backpropagate>=2.0'"
        yield train
        if facts.kind == "gguf":
            yield write_export_command(facts.artifact.get("quantization") or "q4_k_m")
        elif facts.kind == "merged" and facts.artifact:  # and not trained as it stands
            yield write_export_command(None)


def _write_license(facts: CardFacts) -> Iterator[str]:
    yield "## Licence"
    told = " ".join(word for word in (facts.license.name or facts.license.id, facts.license.link) if word)
    yield f"The base's: {told}." if told else f"See the licence of {_link(facts)}, whose card was not at hand."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _to_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value).replace("\n", " ")
