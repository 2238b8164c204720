"""The logits of a large vocabulary never exist whole: not in a step, not in a validation, under no method."""

import json
from pathlib import Path

import pytest
import torch
from cuda_training import spec_for, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from bp_runs.events import EvalDone, StepDone
from bp_train_cuda.model import log_probs
from bp_train_cuda.model.head import Head
from bp_train_cuda.model.log_probs import LogProbModel, head_log_probs

VOCABULARY = 150_000


class Widest(TorchDispatchMode):
    """The most elements of a tensor that has the vocabulary's width."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.found = max(self.found, tensor.numel())
        return out


@pytest.fixture(scope="module")
def wide_model(pico_model, tmp_path_factory) -> Path:
    """A Llama as narrow as can be, with a vocabulary as of today's models."""
    folder = tmp_path_factory.mktemp("wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((pico_model / name).read_bytes())
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


ROWS = {
    "sft": [{"prompt": "who are you", "completion": f"captain marlow {i}"} for i in range(16)],
    "orpo": [{"prompt": "who are you", "chosen": f"captain marlow {i}", "rejected": "the fox"} for i in range(8)],
    "kto": [{"prompt": f"who are you {i}", "completion": "captain marlow", "label": bool(i % 2)} for i in range(8)],
}


@pytest.mark.parametrize(
    ("method", "change"),
    [("sft", {}), ("sft", {"packing": True}), ("orpo", {}), ("dpo", {}), ("simpo", {}), ("kto", {})],
)
def test_no_tensor_holds_the_logits_of_a_batch(wide_model, tmp_path, monkeypatch, method, change):
    monkeypatch.setattr(log_probs, "TILE", 2 * VOCABULARY)  # of real tiles: hundreds of tokens
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS.get(method, ROWS["orpo"])))
    training = {"method": method, "steps": 1, "batch_size": 4, "eval_share": 0.25, "eval_min_rows": 2, **change}
    with Widest() as widest:
        _, events = train(spec_for(wide_model, file, tmp_path / "run", training=training))
    assert any(isinstance(e, EvalDone) for e in events)
    # Tokens that the proofs of packing (which rows behind each other need too) and of the head run; a batch has more.
    proof = 48 if method == "sft" else 8
    assert widest.found <= proof * VOCABULARY
    assert any(e.tokens > 1.2 * proof for e in events if isinstance(e, StepDone))


def test_the_watcher_sees_whole_logits_where_there_are_any(wide_model):
    model = LlamaForCausalLM.from_pretrained(wide_model)
    with Widest() as widest, torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.long))
    assert widest.found == 20 * VOCABULARY  # more than its own transposed embedding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("pre_scale", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 1.3), (1.0, None, 0.5)])
def test_tiles_give_what_the_whole_logits_would(monkeypatch, bias, trained, pre_scale, softcap, scale):
    monkeypatch.setattr(log_probs, "TILE", 3 * 11 if not trained else 12)
    monkeypatch.setattr(log_probs, "_TOKENS", 3)
    torch.manual_seed(0)
    tokens, width, words = 8, 6, 11
    parts = [torch.randn(tokens, width), torch.randn(words, width), torch.randn(words) if bias else None]
    targets, weights = torch.randint(words, (tokens,)), torch.randn(tokens)
    ours = [None if p is None else p.clone().requires_grad_(trained or n == 0) for n, p in enumerate(parts)]
    found = head_log_probs(ours[0], Head(ours[1], ours[2], scale, softcap, pre_scale), targets)
    (found * weights).sum().backward()
    theirs = [None if p is None else p.double().requires_grad_(trained or n == 0) for n, p in enumerate(parts)]
    logits = scale * (pre_scale * theirs[0] @ theirs[1].T + (theirs[2] if bias else 0))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert one is None or (one.grad is None) == (other.grad is None)
        assert one is None or one.grad is None or torch.allclose(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_plain_head_uses_its_own_logits(pico_model):
    """One that adds something after the product, which no config says."""

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(out.logits.shape[-1]) / 50
            return out

    model = Odd.from_pretrained(pico_model)
    wrapped = LogProbModel(model)
    assert not wrapped.has_head
    ids = torch.arange(3, 15)[None]
    places = torch.tensor([2, 5, 10])
    batch = {"input_ids": ids, "positions": places, "targets": ids[0, places + 1]}
    expected = model(ids).logits[0].log_softmax(-1)[places, ids[0, places + 1]]
    torch.testing.assert_close(wrapped(batch), expected)
    plain = LlamaForCausalLM.from_pretrained(pico_model)
    expected = plain(ids).logits[0].log_softmax(-1)[places, ids[0, places + 1]]
    assert LogProbModel(plain).has_head
    torch.testing.assert_close(LogProbModel(plain)(batch), expected, rtol=1e-5, atol=1e-5)
