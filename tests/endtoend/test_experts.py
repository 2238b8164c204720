"""LoRA on the experts of Qwen3-MoE and gpt-oss: trained, merged and exported; the merged model is the trained one."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
from peft import PeftModel  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from backpropagate import Trainer  # noqa: E402
from bp_export import export_adapter  # noqa: E402
from bp_export.chat.server import is_installed  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
KINDS = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_experts_goes_through_to_a_gguf(kind, pico_model, chat_file, tmp_path):
    base = tmp_path / "base"
    size = AutoConfig.from_pretrained(pico_model).vocab_size
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=size, **SIZES, **KINDS[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    for file in pico_model.iterdir():
        if "token" in file.name or file.name.endswith(".jinja"):
            (base / file.name).write_bytes(file.read_bytes())
    options = {"steps": 2, "lr": 1e-2, "max_seq_length": 128, "report_to": "none", "target_modules": "q_proj,experts"}
    adapter = Trainer(str(base), output=tmp_path / "out", **options).train(chat_file).adapter
    merged = export_adapter(adapter, format="merged", output=tmp_path / "merged", verify=True)
    assert merged.parity.result == "passed"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        before = plain(ids).logits
        trained = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (trained - found).abs().max() < 1e-5
    assert (trained - before).abs().max() > 1e-3
    done = export_adapter(adapter, quantization="f16", output=tmp_path / "x.gguf", verify=is_installed())
    assert done.parity is None or done.parity.result == "passed"
