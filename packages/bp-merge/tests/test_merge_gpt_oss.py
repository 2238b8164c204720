"""gpt-oss's experts: transposed, gate and up taking turns, or in 4 bits; read and folded against transformers and PEFT."""

import json

import numpy as np
import pytest

from bp_merge import AdapterMismatchError, FoldedModel, TensorsInvalidError, load_adapter, open_model
from bp_merge.experts import parse_expert
from bp_runs.errors import AdapterInvalidError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors.torch import load_file, save_file  # noqa: E402

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MODULE = "model.layers.1.mlp.experts"


def write_base(folder):
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))
    model.save_pretrained(folder)
    return model


def write_adapter(folder, model, **options):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, **options))
    torch.manual_seed(1)
    for key, weight in adapted.named_parameters():
        if "lora_" in key:
            weight.data = torch.randn_like(weight) * 0.1
    adapted.save_pretrained(folder)
    name_base(folder)
    return {key: value.numpy() for key, value in adapted.merge_and_unload().state_dict().items()}


def name_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder.parent / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read_all(base, adapter=None):
    with FoldedModel(open_model(base), adapter and load_adapter(adapter)) as model:
        return {n: model.read_rows(n, 0, i.rows).reshape(i.shape) for n, i in model.tensors.items()}


def find_expected(merged, name):
    """One matrix or bias out of transformers' parameters."""
    expert = parse_expert(name)
    if expert is None:
        return merged[name]
    whole = merged[f"{expert.module}.{expert.parameter}{'_bias' if name.endswith('bias') else ''}"][expert.index]
    own = whole if expert.projection == "down_proj" else whole[..., expert.projection == "up_proj" :: 2]
    return own.T


def test_a_fold_of_transposed_experts_is_pefts_merge(tmp_path):
    model = write_base(tmp_path / "base")
    merged = write_adapter(
        tmp_path / "lora",
        model,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    )
    found = read_all(tmp_path / "base", tmp_path / "lora")
    assert len(found) == len(merged) + 2 * (2 * (4 * 2) + 2 * 4) - 2 * 4
    assert max(np.abs(value - find_expected(merged, name)).max() for name, value in found.items()) < 1e-6


def test_gate_and_up_in_one_layer_per_expert_are_unsloths(tmp_path):
    """Unsloth's gpt-oss in 4 bits has linear layers ``experts.gate_up_projs.3``, whose rows take turns as well."""
    write_base(tmp_path / "base")
    before = read_all(tmp_path / "base")
    random = torch.Generator().manual_seed(3)
    shapes = {f"{MODULE}.gate_up_projs.2": (128, 32), f"{MODULE}.down_projs.0": (32, 64)}
    tensors = {}
    for name, (out, inp) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, inp, generator=random)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 4, generator=random)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate_up_projs", "down_projs"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "x"}))
    after = read_all(tmp_path / "base", tmp_path / "lora")
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {f"{MODULE}.2.gate_proj.weight", f"{MODULE}.2.up_proj.weight", f"{MODULE}.0.down_proj.weight"}
    a, b = (tensors[f"base_model.model.{MODULE}.gate_up_projs.2.lora_{side}.weight"].numpy() for side in "AB")
    for place, name in enumerate(("gate_proj", "up_proj")):
        delta = after[f"{MODULE}.2.{name}.weight"] - before[f"{MODULE}.2.{name}.weight"]
        assert np.abs(delta - 2 * (b @ a)[place::2]).max() < 1e-5
    wrong = {key.replace("gate_up_projs.2", "gate_up_projs.9"): value for key, value in tensors.items()}
    save_file(wrong, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match="no such expert"):
        read_all(tmp_path / "base", tmp_path / "lora")


def pack(folder):
    """The base's experts in 4 bits with random codes, as OpenAI publishes them; returns the parameters they mean."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    file = folder / "model.safetensors"
    tensors, expected, random = load_file(file), {}, torch.Generator().manual_seed(4)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inp, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, inp // 32, 16), generator=random, dtype=torch.uint8)
        scales = torch.randint(118, 130, (experts, out, inp // 32), generator=random, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float().numpy()
    save_file(tensors, file)
    return {**{n: v.float().numpy() for n, v in tensors.items() if v.dtype != torch.uint8}, **expected}


def test_experts_in_4_bits_are_what_transformers_unpacks(tmp_path):
    write_base(tmp_path / "base")
    expected = pack(tmp_path / "base")
    found = read_all(tmp_path / "base")
    assert all(np.array_equal(value, find_expected(expected, name)) for name, value in found.items())


def test_a_damaged_packed_expert_is_an_error(tmp_path):
    write_base(tmp_path / "base")
    pack(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if not name.endswith("down_proj_scales")}, file)
    with pytest.raises(TensorsInvalidError, match="not all there"):
        open_model(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys", "ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("pattern", ["router.weight", "mlp.router.weight", "router"])
def test_patterns_count_for_a_router_as_peft_counts_them(tmp_path, pattern):
    """PEFT looks a parameter's pattern up by its whole name, with the ``weight``."""
    model = write_base(tmp_path / "base")
    merged = write_adapter(
        tmp_path / "lora",
        model,
        target_modules=["q_proj"],
        target_parameters=["mlp.router.weight"],
        alpha_pattern={pattern: 40},
        rank_pattern={pattern: 2},
    )
    found = read_all(tmp_path / "base", tmp_path / "lora")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.router.weight"
        assert np.abs(found[name] - merged[name]).max() < 1e-6


def test_lost_weights_of_a_parameter_are_reported_by_any_name_of_it(tmp_path):
    model = write_base(tmp_path / "base")
    targets = [f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"]
    write_adapter(tmp_path / "lora", model, target_modules=["q_proj"], target_parameters=targets)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "base_layer" not in name}
    assert len(kept) < len(load_file(file))
    save_file(kept, file)
    with pytest.raises(AdapterInvalidError, match="as trained"):
        read_all(tmp_path / "base", tmp_path / "lora")


def test_weights_as_4_bits_left_them_are_not_read_of_gpt_oss(tmp_path):
    write_base(tmp_path / "base")
    with pytest.raises(TensorsInvalidError, match="gpt-oss"):
        open_model(tmp_path / "base", dequantize=True)
