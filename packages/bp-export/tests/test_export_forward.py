"""The gate's independent forward pass, against transformers."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from model_options import FAMILIES, build_model, draw_options  # noqa: E402

from bp_export.verify.decoder import NotCoveredError  # noqa: E402
from bp_export.verify.forward import Forward  # noqa: E402
from bp_merge import FoldedModel, open_model  # noqa: E402

IDS = np.random.default_rng(0).integers(3, 320, 40).tolist()


def save(folder, family, options):
    """A pico model's folder, and what transformers says at every place: (places, vocabulary)."""
    model = build_model(family, options)
    model.save_pretrained(folder)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([IDS])).logits[0].double(), -1).numpy()


def compute(folder, ids=IDS):
    config = json.loads((folder / "config.json").read_bytes())
    with FoldedModel(open_model(folder)) as model:
        return Forward(config, model).compute_logprobs(ids, range(len(ids)))


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 40))])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_computes(tmp_path, family, seed):
    options = draw_options(family, seed)
    expected = save(tmp_path, family, options)
    apart = np.abs(compute(tmp_path) - expected)
    # A delta net amplifies float32's rounding at single places, in transformers and here.
    assert np.quantile(apart, 0.999) < 1e-4, options
    assert apart.max() < 1e-3, options


def test_a_head_of_its_own_counts_even_if_the_config_says_it_is_tied(tmp_path):
    """Fault 1 of the exporter: transformers itself ties such a model again when it loads it."""
    options = {**draw_options("llama", 0), "tie_word_embeddings": False}
    expected = save(tmp_path, "llama", options)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert np.abs(compute(tmp_path) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"architectures": ["BertModel"]}, "BertModel"),
        ("llama", {"hidden_act": "tanh"}, "tanh"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2", {"num_hidden_layers": None}, "num_hidden_layers"),
        ("qwen2", {"num_hidden_layers": 5, "layer_types": None}, r"layers\.4\."),
        ("qwen2", {"layer_types": ["full_attention"]}, "1 layer_types"),
    ],
)
def test_what_it_does_not_know_it_says(tmp_path, family, changes, word):
    save(tmp_path, family, draw_options(family, 0))
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(NotCoveredError, match=word):
        compute(tmp_path)
