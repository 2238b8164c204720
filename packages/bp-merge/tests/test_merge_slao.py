"""SLAO: the algebra that the paper's formulas imply, and the state between runs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_pico import SHAPES, draw_factors, write_adapter, write_drawn

from bp_merge import (
    blend,
    factor_rows,
    load_adapter,
    merge_adapters,
    orthonormal_rows,
    read_state,
    start_stream,
    write_adapter_like,
    write_state,
    write_tensors,
)
from bp_merge.errors import AdapterUnmergeableError, SlaoStateError, SlaoStreamError


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(seed=st.integers(0, 2**16), r=st.integers(1, 12), extra=st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_the_start_is_an_orthonormal_base_of_the_same_span(seed, r, extra):
    a = draw(seed, r, r + extra)
    start = orthonormal_rows(a)
    assert np.abs(start @ start.T - np.eye(r)).max() < 1e-5
    turn = a.astype(np.float64) @ start.T  # a = Rᵀ Qᵀ, lower triangular, positive on the diagonal
    assert np.abs(turn @ start - a).max() < 1e-4 * np.abs(a).max() * r
    assert np.abs(np.triu(turn, 1)).max() < 1e-4 * np.abs(a).max() * r
    assert (np.diagonal(turn) > 0).all()


def test_an_orthonormal_a_is_left_alone():
    a = orthonormal_rows(draw(1, 8, 40))
    assert np.abs(orthonormal_rows(a) - a).max() < 1e-6


def test_lengths_of_rows_do_not_count():
    a = draw(2, 8, 40)
    scaled = a * np.linspace(0.1, 30, 8, dtype=np.float32)[:, None]
    assert np.abs(orthonormal_rows(a) - orthonormal_rows(scaled)).max() < 1e-5


def test_rows_that_depend_on_each_other_give_finite_orthonormal_ones():
    a = draw(3, 6, 20)
    a[4], a[5] = 0, a[0]
    for broken in (a, np.zeros((6, 20), np.float32)):
        start = orthonormal_rows(broken)
        assert np.abs(start @ start.T - np.eye(6)).max() < 1e-5


def test_steps_shrink_with_the_root_of_i():
    zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    for i, expected in ((1, 1.0), (2, 0.7071068), (4, 0.5), (9, 1 / 3)):
        assert blend(zero, one, i)[0, 0] == pytest.approx(expected, abs=1e-6)
    b = draw(4, 5, 3)
    assert np.array_equal(blend(b, b, 7), b)


def weights_of(count):
    """w_i = λ(i) Π_{j>i} (1 - λ(j))."""
    steps = [1 / math.sqrt(i) for i in range(1, count + 1)]
    return [steps[i] * math.prod(1 - later for later in steps[i + 1 :]) for i in range(count)]


def test_merges_in_turn_are_a_weighted_sum(tmp_path):
    assert [round(w, 3) for w in weights_of(3)] == [0.124, 0.299, 0.577]
    assert [round(w, 3) for w in weights_of(5)] == [0.034, 0.083, 0.160, 0.276, 0.447]
    folders = [write_drawn(tmp_path / str(i), i) for i in range(5)]
    merge_adapters(folders, tmp_path / "merged", run_id="r", method="slao")
    found = load_adapter(tmp_path / "merged").modules
    state = start_stream("s", folders[0])
    for folder in folders[1:]:
        state = state.fold(folder)
    for module in SHAPES:
        a, _ = draw_factors(4)[module]
        b = sum(w * draw_factors(i)[module][1] for i, w in enumerate(weights_of(5)))
        assert np.abs(state.merged[module] - b).max() < 1e-5
        assert np.array_equal(state.a[module], a)
        assert np.abs(found[module].delta() - 2 * b @ a).max() < 1e-4


def test_a_break_between_runs_changes_no_bit(tmp_path):
    folders = [write_drawn(tmp_path / str(i), i) for i in range(4)]
    state = start_stream("s", folders[0])
    for folder in folders[1:3]:
        state = state.fold(folder)
    write_state(tmp_path / "state.safetensors", state)
    again = read_state(tmp_path / "state.safetensors", stream="s")
    assert (again.i, again.scales) == (3, state.scales)
    for qr in (True, False):
        one, other = state.next_start(qr=qr), again.next_start(qr=qr)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    last, resumed = (s.fold(folders[3]).merged_adapter() for s in (state, again))
    assert all(np.array_equal(last[name], resumed[name]) for name in last)


def test_the_next_run_starts_from_the_tuned_b_and_ships_the_merged_one(tmp_path):
    folders = [write_drawn(tmp_path / str(i), i, dtype="BF16") for i in range(2)]
    state = start_stream("s", folders[0]).fold(folders[1])
    for name, tensors in (("start", state.next_start(qr=True)), ("merged", state.merged_adapter())):
        write_adapter_like(folders[1], tmp_path / name, tensors, run_id="r", origin={"method": "slao"})
    start, merged, tuned = (load_adapter(tmp_path / name).modules for name in ("start", "merged", "1"))
    for module in SHAPES:
        assert np.array_equal(start[module].b, tuned[module].b)
        assert np.abs(start[module].a @ start[module].a.T - np.eye(4)).max() < 1e-5
        assert np.array_equal(merged[module].a, tuned[module].a)
        assert not np.array_equal(merged[module].b, tuned[module].b)


def test_a_turn_gives_orthonormal_rows_and_changes_no_weight(tmp_path):
    """Both changes of the weights stay to 1e-6, where the paper's start alters them; twice is as good as once."""
    folders = [write_drawn(tmp_path / str(i), i) for i in range(3)]
    state = start_stream("s", folders[0]).fold(folders[1])
    turned = state.turn()
    again = turned.turn()
    for module in SHAPES:
        a, q = state.a[module], turned.a[module]
        assert np.abs(q @ q.T - np.eye(4)).max() < 1e-6
        assert np.array_equal(turned.next_start(qr=False)[f"base_model.model.{module}.lora_A.weight"], q)
        for before, after in ((state.tuned, turned.tuned), (state.merged, turned.merged)):
            expected = before[module].astype(np.float64) @ a
            assert np.abs(after[module] @ q - expected).max() < 1e-6 * np.abs(expected).max()
            assert np.abs(before[module] @ q - expected).max() > 0.1 * np.abs(expected).max()
            assert np.abs(again.merged[module] - turned.merged[module]).max() < 1e-5
        b = draw_factors(2)[module][1]
        merged = turned.fold(folders[2]).merged[module]
        assert np.abs(merged - blend(state.merged[module] @ factor_rows(a)[0], b, 3)).max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r": 5}, r"\(16, 40, 4, 2.0\) in the stream s and \(16, 40, 5, 2.0\)"),
        ({"lora_alpha": 4}, r"4, 1.0\)"),
        ({"use_rslora": True}, r"4, 4.0\)"),
        ({"shapes": {"model.layers.0.self_attn.q_proj": (24, 16)}}, "not adapted in"),
        ({"shapes": {**SHAPES, "model.layers.0.mlp.down_proj": (16, 41)}}, r"\(16, 41"),
    ],
)
def test_an_adapter_of_another_shape_ends_a_stream(tmp_path, changes, word):
    state = start_stream("s", write_drawn(tmp_path / "a", 1))
    with pytest.raises(SlaoStreamError, match=word):
        state.fold(write_drawn(tmp_path / "b", 2, **changes))


def test_dora_is_refused(tmp_path):
    with pytest.raises(AdapterUnmergeableError, match="DoRA"):
        start_stream("s", write_adapter(tmp_path / "a", draw_factors(1), use_dora=True))


def test_state_files_that_cannot_be_used(tmp_path):
    file = tmp_path / "state.safetensors"
    with pytest.raises(SlaoStateError, match="cannot be used"):
        read_state(file, stream="s")
    write_state(file, start_stream("other", write_drawn(tmp_path / "a", 1)))
    with pytest.raises(SlaoStreamError, match="belongs to the stream other, not to s"):
        read_state(file, stream="s")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(SlaoStateError):
        read_state(file, stream="other")
    write_tensors(file, {"x": np.ones(3, np.float32)})
    with pytest.raises(SlaoStateError, match="no state"):
        read_state(file, stream="other")
