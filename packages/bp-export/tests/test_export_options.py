"""Every option of transformers' config classes that changes logits is exported identically, rejected, or warned of.

Generated: each field of each supported family's config class is changed on a pico model with the same weights. Where
transformers' logits change, llama.cpp's of the export must change alike. All of it: `just options`; a share by default.
"""

import numpy as np
import pytest
from export_pico import export_adapter, read_place, skip_without_llama_cpp, write_tokenizer

skip_without_llama_cpp()
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from model_options import COMMON, FAMILIES, ROPES, build_model  # noqa: E402
from pico_configs import build_config  # noqa: E402

from bp_export.chat.server import LlamaServer  # noqa: E402
from bp_export.gguf.file import read_settings  # noqa: E402
from bp_export.verify.evidence import compute_divergence  # noqa: E402
from bp_runs.errors import CodedError  # noqa: E402

IDS = np.random.default_rng(0).integers(4, 290, 40).tolist()
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
OWN = {
    "llama": {"head_dim": 16, "rope_parameters": ROPE},
    "mistral": {"head_dim": 16, "sliding_window": None, "rope_parameters": ROPE},
    "qwen2": {"rope_parameters": ROPE},
    "qwen3": {"head_dim": 16, "rope_parameters": ROPE},
    "qwen3-moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "rope_parameters": ROPE,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE},
    "qwen2-moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "rope_parameters": ROPE,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "rope_parameters": ROPE},
    "gpt-oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "rope_parameters": ROPE,
    },
    "smollm3": {"rope_parameters": ROPE},
    "phi3": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}, "sliding_window": None},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "rope_parameters": ROPE},
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "num_hidden_layers": 7},
    "qwen35": {
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
    },
}
OWN |= {
    "granite": {"rope_parameters": ROPE},
    "ministral3": {
        "head_dim": 16,
        "sliding_window": None,
        "rope_parameters": {
            **ROPE,
            **ROPES["yarn"],
            "rope_type": "yarn",
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "olmo2": {"rope_parameters": ROPE},
    "olmo3": {"sliding_window": 12},
    "glm4": {"head_dim": 16, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "block_multiple_of": 16,
        "rope_parameters": ROPE,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4, "rope_parameters": ROPE},
    "cohere": {"rope_parameters": ROPE},
    "cohere2": {"sliding_window": 12, "rope_parameters": ROPE},
    "hunyuan": {"head_dim": 16, "rope_parameters": ROPE},
}
EVERY = 24  # of the cases, one in so many runs by default; of mixtures, one in twice as many
CHANGED = 1e-3  # nats
SAME_EXPERTS = 3e-3
"""For mixtures: what float16 rounds may tip a router that is near a tie."""
SAME = 1e-3  # nats of divergence; llama.cpp holds keys and values in float16


def list_changes(options: dict) -> dict[str, dict]:
    """By name, what is changed: every field by its type, and every rotary scaling."""
    changes = {}
    for key, value in options.items():
        if isinstance(value, bool):
            changes[key] = {key: not value}
        elif isinstance(value, int):
            changes[f"{key}*2"], changes[f"{key}/2"] = {key: value * 2 or 1}, {key: value // 2}
        elif isinstance(value, float):
            changes[key] = {key: value * 1.5 or 0.1}
            changes |= {f"{key}=None": {key: None}} if "softcap" in key else {}
        elif value is None:
            changes |= {f"{key}={new}": {key: new} for new in (12, 2.0)}
        elif key in ("hidden_act", "hidden_activation"):
            changes |= {f"{key}={new}": {key: new} for new in ("gelu", "gelu_pytorch_tanh", "relu", "silu")}
        elif isinstance(value, list) and all(isinstance(one, (int, str)) for one in value):
            changes[key] = {key: value[::-1]}
    for kind, rope in ROPES.items():
        changes[f"rope={kind}"] = {"rope_parameters": {**ROPE, **rope, "rope_type": kind.partition("-")[0]}}
    changes["rope_theta"] = {"rope_parameters": {**ROPE, "rope_theta": 500_000.0}}
    changes["partial_rotary_factor"] = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
    changes["window"] = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    return changes


def build_options(family: str) -> dict:
    """The base's options: what is set here, and every other field of the class at its default."""
    set_here = {**COMMON, **SIZES, **OWN[family]}
    known = build_config(FAMILIES[family], set_here).to_dict()
    meta = ("architectures", "model_type", "transformers_version", "dtype", "rope_parameters", "layer_types")
    return {**{key: value for key, value in known.items() if key not in meta and not key.startswith("_")}, **set_here}


CASES = [(family, name) for family in OWN for name in list_changes(build_options(family))]


def is_quick(i: int, family: str) -> bool:
    return i % (2 * EVERY if "num_experts_per_tok" in OWN[family] else EVERY) == 0


def run(model):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([IDS])).logits[0].double(), -1).numpy()


def change_model(family, options, change):
    """The model with the option changed and the weights of the one without; None if sizes change or it is no option."""
    base = build_model(family, options)
    try:
        model = build_model(family, {**options, **change})
        model.load_state_dict(base.state_dict(), strict=False)
        return None if np.abs(run(model) - run(base)).max() < CHANGED else model.eval()
    except Exception:  # transformers rejects the value in its own ways
        return None


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*case, marks=() if is_quick(i, case[0]) else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_an_option_that_changes_logits_is_exported_rejected_or_warned_of(tmp_path, family, name):
    vocab = write_tokenizer(tmp_path)
    options = {**build_options(family), "vocab_size": vocab}
    model = change_model(family, options, list_changes(options)[name])
    if model is None:
        return  # logits do not depend on it
    kept = (tmp_path / "tokenizer_config.json").read_text()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(kept)
    expected = run(model)
    try:
        done = export_adapter(tmp_path, quantization="f32", output=tmp_path / "x.gguf")
    except CodedError as error:
        assert error.code.startswith("INPUT_"), error  # noqa: PT017  # both ends are right
        return
    settings = read_settings(done.path)
    context = settings[f"{settings['general.architecture']}.context_length"]
    with LlamaServer(done.path, 64) as server:
        # llama.cpp keeps a place of the context for the answer.
        for place in sorted({2, min(20, context - 3), min(39, context - 3)}):
            found = read_place(server, IDS[: place + 1])
            order = np.argsort(-expected[place])[:64].tolist()
            apart = compute_divergence(order, expected[place, order].tolist(), found)
            same = SAME_EXPERTS if "num_experts_per_tok" in OWN[family] else SAME
            assert apart < same or done.notes, f"{apart:.3f} nats at token {place}, and nobody is warned"
