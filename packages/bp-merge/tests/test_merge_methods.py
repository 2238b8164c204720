"""Merging adapters: against PEFT, mergekit and the papers' formulas, and everything that must be refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from merge_pico import SHAPES, draw_factors, write_adapter, write_drawn

from bp_merge import (
    METHODS,
    AdapterSource,
    LoraPair,
    MergeOptions,
    ModulePlan,
    cut_matrix,
    cut_product,
    load_adapter,
    lowrank,
    merge_adapters,
)
from bp_merge.errors import AdaptersDifferError, AdapterUnmergeableError, MergeOptionError
from bp_merge.methods import dare, magmax, ties
from bp_runs.adapter import changed_files, read_manifest, write_manifest
from bp_runs.errors import AdapterInvalidError, OutputTakenError

PLAN = ModulePlan(module="m", shares=(0.5, 0.5))


def deltas(folder):
    return {name: pair.delta() for name, pair in load_adapter(folder).modules.items()}


def merge(tmp_path, adapters, method, **options):
    done = merge_adapters(adapters, tmp_path / "merged", run_id="r1", method=method, options=MergeOptions(**options))
    return done, deltas(tmp_path / "merged")


def close(found, expected, tolerance=1e-5):
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def best_cut(matrix, rank):
    """Eckart and Young in float64."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank], float((values[:rank] ** 2).sum() / (values**2).sum())


def test_linear_is_the_best_cut_of_the_exact_mean(tmp_path):
    folders = [write_drawn(tmp_path / "a", 1, r=4), write_drawn(tmp_path / "b", 2, r=6, lora_alpha=3, use_rslora=True)]
    mine = [deltas(folder) for folder in folders]
    done, found = merge(tmp_path, folders, "linear", weights=(0.25, 0.75), scale=2.0)
    assert (done.rank, done.modules) == (6, 2)
    kept = []
    for module in SHAPES:
        expected, share = best_cut(0.5 * mine[0][module] + 1.5 * mine[1][module], 6)
        close(found[module], expected)
        kept.append(share)
    assert min(kept) < done.kept < max(kept)
    assert changed_files(tmp_path / "merged") == []
    assert read_manifest(tmp_path / "merged")["origin"]["options"] == {"weights": [0.25, 0.75], "scale": 2.0}


def test_cat_is_exact_and_its_rank_the_sum(tmp_path):
    folders = [write_drawn(tmp_path / name, seed, r=r) for name, seed, r in (("a", 1, 4), ("b", 2, 6), ("c", 3, 1))]
    done, found = merge(tmp_path, folders, "cat")
    assert (done.rank, done.kept) == (11, 1.0)
    for module in SHAPES:
        close(found[module], sum(deltas(folder)[module] for folder in folders) / 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("method", "theirs"), [("linear", "svd"), ("cat", "cat")])
def test_agreement_with_peft(tmp_path, method, theirs):
    """PEFT's ``add_weighted_adapter``: ``svd`` cuts the sum of changes, ``cat`` stacks them."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(40, 24, bias=False), "k_proj": torch.nn.Linear(40, 8)})
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "k_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight))
    for name in "ab":
        model.save_pretrained(tmp_path, selected_adapters=[name])
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "base"}))
    extra = {"svd_rank": 8} if theirs == "svd" else {}
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "merged", combination_type=theirs, **extra)
    _, found = merge(tmp_path, [tmp_path / "a", tmp_path / "b"], method, weights=(0.3, 0.7))
    for name in ("q_proj", "k_proj"):
        close(found[name], model.base_model.model[name].get_delta_weight("merged").detach().numpy())


def test_ties_is_mergekits(request):
    """Vectors that mergekit 0.1.5's ``ties`` gave for whole changes of a weight (normalize, no rescale)."""
    stored = np.load(request.path.parent / "mergekit_ties.npz")
    pairs = [LoraPair(stored[f"a{i}"], stored[f"b{i}"], float(stored["scales"][i])) for i in range(3)]
    for name in ("equal_20", "weighted_50", "all"):
        density, scale = stored[f"{name}_settings"]
        plan = ModulePlan(module="m", shares=tuple(stored[f"{name}_weights"]), density=density, scale=scale)
        close(ties.merge_change(pairs, plan), stored[name])


def draw_pairs(count=3, *, r=4, d_out=24, d_in=40):
    rng = np.random.default_rng(5)
    return [
        LoraPair(
            rng.standard_normal((r, d_in)).astype(np.float32), rng.standard_normal((d_out, r)).astype(np.float32), 1.5
        )
        for _ in range(count)
    ]


def test_ties_is_not_a_fold_of_pairs():
    """All at once: the mean of three equal changes and an opposite one is the three's."""
    [pair] = draw_pairs(1)
    opposite = replace(pair, b=-pair.b)
    plan = ModulePlan(module="m", shares=(0.25,) * 4, density=1.0)
    for order in ([pair, pair, pair, opposite], [opposite, pair, pair, pair]):
        close(ties.merge_change(order, plan), 1.5 * pair.b @ pair.a)


def test_dare_drops_and_rescales():
    pairs = draw_pairs()
    changes = [1.5 * pair.b @ pair.a for pair in pairs]
    plan = ModulePlan(module="m", shares=(0.2, 0.3, 0.5), density=0.25, seed=3)
    found = dare.merge_change(pairs[:1], replace(plan, shares=(1.0,)))
    stays = found != 0
    assert 0.2 < stays.mean() < 0.3
    close(found[stays], 4 * changes[0][stays])
    assert np.array_equal(dare.merge_change(pairs, plan), dare.merge_change(pairs, plan))
    assert not np.array_equal(dare.merge_change(pairs, plan), dare.merge_change(pairs, replace(plan, seed=4)))
    mean = np.mean([dare.merge_change(pairs, replace(plan, seed=s)) for s in range(300)], axis=0)
    expected = sum(w * change for w, change in zip(plan.shares, changes, strict=True))
    assert np.abs(mean - expected).mean() < 0.25 * np.abs(expected).mean()
    whole = replace(plan, density=1.0)
    close(dare.merge_change(pairs, whole), expected)


def test_magmax_takes_the_largest_entry():
    pairs = draw_pairs()
    changes = np.stack([1.5 * pair.b @ pair.a for pair in pairs])
    expected = np.take_along_axis(changes, np.abs(changes).argmax(axis=0)[None], axis=0)[0]
    close(magmax.merge_change(pairs, replace(PLAN, scale=0.5)), 0.5 * expected)


def test_blocks_of_rows_change_no_bit(monkeypatch):
    pairs = draw_pairs()
    plan = ModulePlan(module="m", shares=(0.2, 0.3, 0.5), density=0.5)
    whole = [module.merge_change(pairs, plan) for module in (dare, magmax)]
    monkeypatch.setattr("bp_merge.methods.deltas._BLOCK", 5 * 40)
    for module, expected in zip((dare, magmax), whole, strict=True):
        close(module.merge_change(pairs, plan), expected, 1e-6)
    assert ties.merge_change(pairs, replace(plan, density=1.0)).shape == (24, 40)


@pytest.mark.parametrize("method", ["ties", "dare", "magmax"])
def test_methods_of_whole_changes_are_cut_to_rank(tmp_path, method):
    folders = [write_drawn(tmp_path / "a", 1), write_drawn(tmp_path / "b", 2)]
    done, found = merge(tmp_path, folders, method, rank=7)
    assert done.rank == 7
    assert 0.3 < done.kept < 1
    pairs = [load_adapter(folder).modules for folder in folders]
    for module in SHAPES:
        plan = ModulePlan(module=module, shares=(0.5, 0.5), density=METHODS[method].density)
        change = {"ties": ties, "dare": dare, "magmax": magmax}[method].merge_change([p[module] for p in pairs], plan)
        close(found[module], best_cut(change, 7)[0])


def test_a_cut_of_factors_that_depend_on_each_other(tmp_path):
    """The same A twice, and an adapter that was never trained: Gram matrices without an inverse."""
    same, never = draw_factors(1), draw_factors(2)
    other = {module: (a, draw_factors(3)[module][1]) for module, (a, b) in same.items()}
    never = {module: (a, np.zeros_like(b)) for module, (a, b) in never.items()}
    folders = [write_adapter(tmp_path / str(i), factors) for i, factors in enumerate((same, other, never))]
    done, found = merge(tmp_path, folders, "linear")
    assert done.kept == pytest.approx(1.0)
    for module in SHAPES:
        close(found[module], sum(deltas(folder)[module] for folder in folders) / 3)
    zero = cut_product(np.zeros((5, 4), np.float32), np.zeros((4, 6), np.float32), 2)
    assert not zero.a.any()
    assert zero.b.shape == (5, 2)


def test_a_large_matrix_is_cut_almost_as_well(monkeypatch):
    monkeypatch.setattr(lowrank, "_EXACT", 10)
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((120, 150)).astype(np.float32)  # no gap: the worst case
    best = best_cut(flat, 8)[1]
    assert 0.97 * best < cut_matrix(flat, 8).kept <= best
    low = (rng.standard_normal((120, 8)) @ rng.standard_normal((8, 150))).astype(np.float32)
    product = cut_matrix(low, 8)
    close(product.b @ product.a, low)


def test_bf16_adapters_stay_bf16_and_are_merged_in_float32(tmp_path):
    folders = [write_drawn(tmp_path / name, seed, dtype="BF16") for name, seed in (("a", 1), ("b", 2))]
    _, found = merge(tmp_path, folders, "cat")
    with AdapterSource(tmp_path / "merged") as merged:
        assert merged.dtype == "BF16"
    for module in SHAPES:
        close(found[module], sum(deltas(folder)[module] for folder in folders) / 2, 2**-7)
    mixed = [folders[0], write_drawn(tmp_path / "c", 3)]
    merge(tmp_path, mixed, "cat")
    with AdapterSource(tmp_path / "merged") as merged:
        assert merged.dtype == "F32"


def test_layers_of_different_ranks(tmp_path):
    factors = {m: f for r, m in zip((2, 5), SHAPES, strict=True) for m, f in draw_factors(1, r=r, shapes={m: SHAPES[m]}).items()}  # fmt: skip
    pattern = {"r": 2, "lora_alpha": 4, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"down_proj": 1}}
    folders = [write_adapter(tmp_path / "a", factors, **pattern), write_drawn(tmp_path / "b", 2, r=3)]
    for method in ("cat", "linear"):
        _, found = merge(tmp_path, folders, method)
        config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
        ranks = (5, 8) if method == "cat" else (3, 5)
        assert config["r"] == config["lora_alpha"] == ranks[1]
        assert config["rank_pattern"] == {"model.layers.0.self_attn.q_proj": ranks[0]}
    for module in SHAPES:
        mean = sum(deltas(folder)[module] for folder in folders) / 2
        close(found[module], best_cut(mean, {24: 3, 16: 5}[SHAPES[module][0]])[0])


def test_tokenizer_and_template_come_from_the_first(tmp_path):
    folders = [write_drawn(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    (folders[0] / "tokenizer.json").write_text("{}")
    (folders[0] / "chat_template.jinja").write_text("mine")
    (folders[1] / "chat_template.jinja").write_text("other")
    done, _ = merge(tmp_path, folders, "linear")
    assert (tmp_path / "merged/chat_template.jinja").read_text() == "mine"
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert "another chat template" in done.notes[0]


@pytest.mark.parametrize(
    ("method", "options", "word"),
    [
        ("liner", {}, "did you mean 'linear'"),
        ("linear", {"weights": (0.5, 0.3)}, "sum to 0.8, not to 1"),
        ("linear", {"weights": (1.0,)}, r"1 weights \(1\) and 2 adapters"),
        ("linear", {"weights": (1.5, -0.5)}, "from 0 on"),
        ("linear", {"weights": (float("nan"), 1.0)}, "nan"),
        ("linear", {"density": 0.5}, "linear takes no density"),
        ("slao", {"weights": (0.5, 0.5)}, "slao takes no weights"),
        ("ties", {"density": 0.0}, "density is 0.0"),
        ("ties", {"density": 1.1}, "density is 1.1"),
        ("magmax", {"scale": 0.0}, "scale is 0.0"),
        ("ties", {"rank": 0}, "rank is 0"),
    ],
)
def test_options_that_make_no_sense(tmp_path, method, options, word):
    folders = [write_drawn(tmp_path / "a", 1), write_drawn(tmp_path / "b", 2)]
    with pytest.raises(MergeOptionError, match=word):
        merge(tmp_path, folders, method, **options)
    assert not (tmp_path / "merged").exists()


def test_weights_that_do_not_sum_are_given_back_as_shares_and_a_factor(tmp_path):
    with pytest.raises(MergeOptionError) as caught:
        merge(tmp_path, [tmp_path, tmp_path], "linear", weights=(1.0, 1.0))
    assert caught.value.fix.endswith("weights=[0.5, 0.5], scale=2")


def test_a_merged_adapter_knows_its_base_as_those_that_it_is_made_of(tmp_path):
    """Bases of one name may differ: one is told from another by the fingerprint, where adapters have it."""
    paths = [write_drawn(tmp_path / name, seed) for seed, name in enumerate("abc")]
    merge(tmp_path, paths, "linear")
    assert "base_fingerprint" not in read_manifest(tmp_path / "merged")
    for path, fingerprint in zip(paths[1:], ("one", "other"), strict=True):
        write_manifest(path, run_id="r0", base="base", fingerprint=fingerprint)
    merge(tmp_path, paths[:2], "linear")
    assert read_manifest(tmp_path / "merged")["base_fingerprint"] == "one"
    with pytest.raises(AdaptersDifferError, match=r"fingerprint of the base is one in .*b and other in .*c"):
        merge(tmp_path, paths[1:], "linear")
    merge_adapters(paths[1:], tmp_path / "merged", run_id="r1", base="me/base")  # whoever says so knows better
    assert "base_fingerprint" not in read_manifest(tmp_path / "merged")


@pytest.mark.parametrize(
    ("changes", "method", "error", "word"),
    [
        ({"base": "other"}, "linear", AdaptersDifferError, "the base is base in .*a and other in .*b"),
        ({"revision": "x"}, "linear", AdaptersDifferError, "base@x"),
        ({"shapes": {**SHAPES, "model.layers.1.mlp.up_proj": (3, 4)}}, "cat", AdaptersDifferError, "adapts 3 layers and .*a 2"),
        ({"shapes": {**SHAPES, "model.layers.0.mlp.down_proj": (16, 41)}}, "ties", AdaptersDifferError, r"\(16, 40\) in .*a and \(16, 41\)"),
        ({"r": 5}, "slao", AdaptersDifferError, "rank of .* is 4 in .*a and 5"),
        ({"lora_alpha": 3}, "slao", AdaptersDifferError, "scale of .* is 2.0 in .*a and 0.75"),
        ({"use_dora": True}, "linear", AdapterUnmergeableError, "DoRA"),
        ({"bias": "all"}, "linear", AdapterUnmergeableError, "biases"),
        ({"modules_to_save": ["lm_head"]}, "cat", AdapterUnmergeableError, "whole layers"),
        ({"init_lora_weights": "pissa"}, "cat", AdapterUnmergeableError, "changes the base"),
        ({"extra": {"base_model.model.x.lora_embedding_A": np.ones((1, 2), np.float32)}}, "cat", AdapterUnmergeableError, "lora_embedding_A"),
        ({"extra": {"base_model.model.x.lora_A.weight": np.ones((4, 2), np.float32)}}, "cat", AdapterInvalidError, "only one"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_belong_together(tmp_path, changes, method, error, word):
    folders = [write_drawn(tmp_path / "a", 1), write_drawn(tmp_path / "b", 2, **changes)]
    with pytest.raises(error, match=word):
        merge(tmp_path, folders, method)
    assert not (tmp_path / "merged").exists()


def test_a_weight_that_is_not_a_number_leaves_nothing(tmp_path):
    broken = draw_factors(2)
    broken["model.layers.0.self_attn.q_proj"][0][1, 1] = np.nan
    folders = [write_drawn(tmp_path / "a", 1), write_adapter(tmp_path / "b", broken)]
    with pytest.raises(AdapterInvalidError, match=r"q_proj of .*b has weights that are not finite"):
        merge(tmp_path, folders, "linear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_one_base_under_two_names(tmp_path):
    folders = [write_drawn(tmp_path / "a", 1), write_drawn(tmp_path / "b", 2, base="other")]
    merge_adapters(folders, tmp_path / "merged", run_id="r1", base="owner/base")
    assert load_adapter(tmp_path / "merged").folder.base == "owner/base"


def test_only_folders_of_ours_are_replaced(tmp_path):
    folders = [write_drawn(tmp_path / "a", 1), write_drawn(tmp_path / "b", 2)]
    merge(tmp_path, folders, "linear")
    merge(tmp_path, folders, "cat")
    with pytest.raises(OutputTakenError):
        merge_adapters(folders, tmp_path, run_id="r1", force=True)
    trained = write_drawn(tmp_path / "trained", 3)
    write_manifest(trained, run_id="r0", base="base")
    before = (trained / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputTakenError, match="trained") as caught:
        merge_adapters(folders, trained, run_id="r1")
    assert "force=True" in caught.value.fix
    assert (trained / "adapter_model.safetensors").read_bytes() == before
    merge_adapters(folders, trained, run_id="r1", force=True)
    assert (trained / "adapter_model.safetensors").read_bytes() != before
    with pytest.raises(MergeOptionError, match="one of the adapters"):
        merge_adapters([tmp_path / "merged", *folders], tmp_path / "merged", run_id="r1")
    with pytest.raises(MergeOptionError, match="two or more"):
        merge_adapters(folders[:1], tmp_path / "x", run_id="r1")
