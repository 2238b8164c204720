"""The logits of a large vocabulary never exist whole: not in a step, not in a validation, under no method."""

import json
from pathlib import Path

import pytest
import torch
from cuda_training import spec_for, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils as trl_head

from bp_runs.events import EvalDone, StepDone
from bp_train_cuda import head
from bp_train_cuda.errors import TrainingFailedError

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
    "sft": [{"prompt": "who are you", "completion": f"captain marlow {i}"} for i in range(8)],
    "orpo": [{"prompt": "who are you", "chosen": f"captain marlow {i}", "rejected": "the fox"} for i in range(8)],
    "kto": [{"prompt": f"who are you {i}", "completion": "captain marlow", "label": bool(i % 2)} for i in range(8)],
}


@pytest.mark.parametrize(
    ("method", "change"),
    [("sft", {}), ("sft", {"packing": True}), ("orpo", {}), ("dpo", {}), ("simpo", {}), ("kto", {})],
)
def test_no_tensor_holds_the_logits_of_a_batch(wide_model, tmp_path, method, change):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS.get(method, ROWS["orpo"])))
    training = {"method": method, "steps": 1, "batch_size": 4, "eval_share": 0.25, "eval_min_rows": 2, **change}
    with Widest() as widest:
        _, events = train(spec_for(wide_model, file, tmp_path / "run", training=training))
    assert any(isinstance(e, EvalDone) for e in events)
    assert widest.found <= VOCABULARY  # not even the logits of two tokens


def test_the_watcher_sees_whole_logits_where_there_are_any(wide_model):
    model = LlamaForCausalLM.from_pretrained(wide_model)
    with Widest() as widest, torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.long))
    assert widest.found == 20 * VOCABULARY  # more than its own transposed embedding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 1.3)])
def test_tiles_give_what_the_whole_logits_would(monkeypatch, bias, temperature, softcap, scale):
    monkeypatch.setattr(head, "TOKENS", 3)
    torch.manual_seed(0)
    tokens, width, words = 8, 6, 11
    parts = [torch.randn(tokens, width), torch.randn(words, width), torch.randn(words) if bias else None]
    targets, weights = torch.randint(words, (tokens,)), torch.randn(tokens)
    ours = [None if p is None else p.clone().requires_grad_() for p in parts]
    logps, entropy, *_, top = head.TiledLogProbs.apply(
        *ours, targets, temperature, 4, softcap, scale, ("log_probs", "entropy", "is_top1")
    )
    (logps * weights).sum().backward()
    theirs = [None if p is None else p.double().requires_grad_() for p in parts]
    logits = scale * (theirs[0] @ theirs[1].T + (theirs[2] if bias else 0))
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    whole = logits.log_softmax(dim=1)
    expected = whole.gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(whole.exp() * whole).sum(dim=1), rtol=1e-5, atol=1e-5)
    assert torch.equal(top, whole.argmax(dim=1) == targets)
    for one, other in zip(ours, theirs, strict=True):
        assert one is None or torch.allclose(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_trl_without_a_way_for_this_device_trains_on_ours(
    pico_model, chat_file, pair_file, tmp_path, monkeypatch, method
):
    """TRL before 1.16 launches a Triton kernel, for which a CPU has no driver."""

    def losses(name):
        file = chat_file if method == "sft" else pair_file
        spec = spec_for(pico_model, file, tmp_path / name, training={"method": method, "steps": 3})
        return [e.loss for e in train(spec)[1] if isinstance(e, StepDone)]

    class NeedsTriton(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *_):
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    expected = losses("theirs")
    with monkeypatch.context() as patch:
        patch.setattr(trl_head, "_ChunkedLogProbFunction", NeedsTriton)
        with pytest.raises(TrainingFailedError, match="0 active drivers"):
            patch.setattr(head, "HAS_OWN_WAY", True)
            losses("fails")
        patch.setattr(head, "HAS_OWN_WAY", False)
        assert losses("ours") == pytest.approx(expected, rel=1e-5)
