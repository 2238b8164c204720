"""LoRA on the experts of a mixture, in every form that an adapter and a checkpoint have, against PEFT's own merge."""

import json

import numpy as np
import pytest

from bp_merge import AdapterMismatchError, AdapterSource, AdapterUnmergeableError, FoldedModel, load_adapter, open_model
from bp_merge.experts import parse_expert
from bp_runs.errors import AdapterInvalidError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from safetensors.torch import load_file, save_file  # noqa: E402

# PEFT looks for patterns among modules only when it warns; it does apply them to parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
KINDS = {
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(kind, dtype):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def write_case(folder, kind="qwen3-moe", dtype=torch.float32, *, fused=False, **lora):
    """A base, an adapter with random weights, and PEFT's merge: the tensors by transformers' names."""
    model = build(kind, dtype)
    model.save_pretrained(folder / "base")
    if fused:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(state, folder / "base" / "model.safetensors")
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "target_parameters": PARAMETERS, **lora}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(1)
    for key, weight in adapted.named_parameters():
        if "lora_" in key:
            weight.data = torch.randn_like(weight) * 0.1
    adapted.save_pretrained(folder / "lora")
    name_base(folder)
    return {key: value.float().numpy() for key, value in adapted.merge_and_unload().state_dict().items()}


def name_base(folder, **changes):
    file = folder / "lora" / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": str(folder / "base"), **changes}
    file.write_text(json.dumps(config))


def change_adapter(folder, change):
    """Rewrite the adapter's tensors by a function of all of them."""
    file = folder / "lora" / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, file)


def read_folded(folder):
    with FoldedModel(open_model(folder / "base"), load_adapter(folder / "lora")) as model:
        whole = {n: model.read_rows(n, 0, i.rows).reshape(i.shape) for n, i in model.tensors.items()}
        return whole, model.changed, model.list_unreached_experts()


def find_expected(merged, name):
    """One matrix out of transformers' fused parameters."""
    expert = parse_expert(name)
    if expert is None:
        return merged[name.replace("block_sparse_moe", "mlp")]
    whole = merged[f"{expert.module}.{expert.parameter}"][expert.index]
    if expert.projection == "down_proj":
        return whole
    return np.split(whole, 2)[expert.projection == "up_proj"]


@pytest.mark.parametrize(
    ("kind", "dtype", "fused"),
    [
        ("qwen3-moe", torch.bfloat16, False),
        ("qwen3-moe", torch.float32, True),
        ("mixtral", torch.bfloat16, True),
        ("mixtral", torch.float32, False),
    ],
)
def test_a_fold_of_experts_is_pefts_merge(tmp_path, kind, dtype, fused):
    lora = {"rank_pattern": {r".*\.down_proj": 3}, "alpha_pattern": {r".*\.gate_up_proj": 5}}
    router = ["mlp.gate.weight"]
    merged = write_case(tmp_path, kind, dtype, fused=fused, target_parameters=[*PARAMETERS, *router], **lora)
    whole, changed, unreached = read_folded(tmp_path)
    assert sum(parse_expert(name) is not None for name in changed) == 2 * 4 * 3
    assert sum(name.endswith(("mlp.gate.weight", "moe.gate.weight")) for name in changed) == 2
    assert not unreached
    for name, found in whole.items():
        expected = find_expected(merged, name)
        assert np.abs(found - expected).max() <= (1e-6 if dtype == torch.float32 else 0), name


def test_one_adapter_per_expert_is_folded_into_both_forms(tmp_path):
    """As transformers 4 trained it; PEFT converts such an adapter when it loads it."""
    write_case(tmp_path)
    one_by_one(tmp_path)
    for fused in (False, True):
        model = build("qwen3-moe", torch.float32)
        if fused:
            save_file(
                {name: value.clone() for name, value in model.state_dict().items()},
                tmp_path / "base" / "model.safetensors",
            )
        merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
        merged = {key: value.numpy() for key, value in merged.items()}
        whole, changed, unreached = read_folded(tmp_path)
        assert len(changed) == 2 * 4 * 3
        assert not unreached
        assert max(np.abs(found - find_expected(merged, name)).max() for name, found in whole.items()) < 1e-6


def one_by_one(folder):
    """Turn the adapter into one with a pair for each expert's matrix."""
    draw = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (rows, columns) in {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=draw)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=draw)
    change_adapter(folder, lambda _: tensors)
    name_base(folder, target_parameters=None, target_modules=["gate_proj", "up_proj", "down_proj"])


def test_weights_of_an_older_peft_are_known_by_their_shape(tmp_path):
    """Before 0.19 "in" was a parameter's second axis and "out" its third, whatever the model meant by them."""
    merged = write_case(tmp_path)

    def turn(tensors):
        turned = {}
        for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            a, b = a.reshape(4, 4, -1), b.reshape(b.shape[0], 4, 4)  # (experts, r, in), (out, r, experts)
            turned[key] = b.permute(2, 1, 0).reshape(16, -1)
            turned[key.replace("lora_A", "lora_B")] = a.permute(2, 1, 0).reshape(-1, 16)
        return {**tensors, **turned}

    change_adapter(tmp_path, turn)
    whole, _, _ = read_folded(tmp_path)
    assert max(np.abs(found - find_expected(merged, name)).max() for name, found in whole.items()) < 1e-6


def test_weights_that_fit_both_ways_round_need_pefts_version(tmp_path):
    config = {"num_experts": 4, "moe_intermediate_size": 32}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**COMMON, **config))
    model.save_pretrained(tmp_path / "base")
    options = {"r": 4, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(tmp_path / "lora")
    name_base(tmp_path)
    assert len(read_folded(tmp_path)[1]) == 2 * 4
    name_base(tmp_path, peft_version=None)
    with pytest.raises(AdapterMismatchError, match="both ways round") as raised:
        read_folded(tmp_path)
    assert "peft_version" in raised.value.fix


def test_missing_weights_of_a_trained_parameter_are_an_error(tmp_path):
    write_case(tmp_path)
    drop = "layers.1.mlp.experts.base_layer."
    change_adapter(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if drop not in k})
    with pytest.raises(AdapterInvalidError, match=r"gate_up_proj of layers\.1\.mlp\.experts"):
        read_folded(tmp_path)


def test_a_missing_pair_of_one_expert_is_reported(tmp_path):
    write_case(tmp_path)
    one_by_one(tmp_path)
    change_adapter(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "1.mlp.experts.2.up_proj" not in k})
    assert read_folded(tmp_path)[2] == ["model.layers.1.mlp.experts.2.up_proj.weight"]


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (lambda k, v: {k.replace("mlp.", "moe."): v}, AdapterMismatchError, "no such experts"),
        (lambda k, v: {k: v[:, :-1] if "lora_A" in k and "experts" in k else v}, AdapterMismatchError, "lora_A"),
        (lambda k, v: {k: v[:8] if "lora_A" in k else v[:, :8]}, AdapterInvalidError, "says rank 4"),
        (lambda k, v: {k: v[:8] if "lora_A" in k else v}, AdapterInvalidError, "ranks differ"),
        (lambda k, v: {k: v * float("nan")}, AdapterInvalidError, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, error, word):
    write_case(tmp_path)
    change_adapter(
        tmp_path,
        lambda tensors: {
            k: v for key, value in tensors.items() if "experts" in key for k, v in change(key, value).items()
        },
    )
    with pytest.raises(error, match=word):
        read_folded(tmp_path)


def test_merge_methods_refuse_experts(tmp_path):
    write_case(tmp_path)
    with pytest.raises(AdapterUnmergeableError, match="target_parameters"):
        AdapterSource(tmp_path / "lora")
