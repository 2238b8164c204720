"""Changes that break a promise of the README or the handbook, each with the test that must notice it.

`run_mutants.py` applies them one by one to a copy of the sources; `test_mutants.py`, in the default run, checks that
each still fits the sources. If you change one of these lines, change its entry with it. If a change to the sources
removes the promise's line, find the line that keeps the promise now.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of one file."""

    name: str
    promise: str
    """What no longer holds."""
    file: str
    """Below ``packages``."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    test: str
    """The test that fails, as pytest names it, below ``packages``; passes without the change."""


MUTATIONS = (
    # Data: what is trained on
    Mutation(
        "mask",
        "only the assistant's tokens are trained on",
        "bp-data/src/bp_data/mask.py",
        "low, high = bisect_left(starts, span.start), bisect_left(starts, span.end)",
        "low, high = bisect_left(starts, span.start) - 2, bisect_left(starts, span.end)",
        "bp-data/tests/test_data_masks.py::test_chatml_learns_answers_with_their_end_and_no_line_feed",
    ),
    Mutation(
        "mask proof",
        "tokens to train on are decoded and compared with the assistant's text",
        "bp-data/src/bp_data/mask.py",
        "    verify(encoded, mask, marked, tokenizer)\n    return encoded.ids, mask",
        "    return encoded.ids, mask",
        "bp-data/tests/test_data_masks.py::test_a_tokenizer_that_loses_bytes_is_found_out",
    ),
    Mutation(
        "packing: positions",
        "each packed example starts at position 0",
        "bp-data/src/bp_data/pack.py",
        'array("i", (place for length in self.lengths for place in range(length)))',
        'array("i", range(sum(self.lengths)))',
        "bp-data/tests/test_data_pack.py::test_loss_and_gradients_of_a_pack_are_those_of_its_rows",
    ),
    Mutation(
        "packing: first token",
        "no packed example predicts the first token of the next",
        "bp-data/src/bp_data/pack.py",
        'mask += b"\\x00" + row.mask[1:]',
        "mask += row.mask",
        "bp-data/tests/test_data_pack.py::test_packing_keeps_every_token_once",
    ),
    Mutation(
        "packing: attention",
        "no packed example attends to another",
        "bp-data/src/bp_data/pack.py",
        "seen <= at and owner[seen] == owner[at]",
        "seen <= at",
        "bp-data/tests/test_data_pack.py::test_the_block_mask_never_reaches_into_another_row",
    ),
    Mutation(
        "ledger",
        "rows read = whole + truncated + dropped",
        "bp-data/src/bp_data/ledger.py",
        "        self.read += 1\n        self.truncated += 1\n",
        "        self.truncated += 1\n",
        "bp-data/tests/test_data_prepare.py::test_read_is_trained_and_truncated_and_dropped",
    ),
    Mutation(
        "ledger check",
        "a row that got lost ends the run",
        "bp-data/src/bp_data/ledger.py",
        "if self.read != self.whole + self.truncated + self.dropped or",
        "if self.read < self.whole + self.truncated + self.dropped or",
        "bp-data/tests/test_data_prepare.py::test_the_ledger_notices_a_lost_row",
    ),
    Mutation(
        "held-out rows",
        "validation rows are not trained on",
        "bp-data/src/bp_data/split.py",
        "for place in range(len(rows)) if place not in places)",
        "for place in range(len(rows)))",
        "bp-data/tests/test_data_prepare.py::test_the_split_is_small_disjoint_and_repeatable",
    ),
    Mutation(
        "held-out rows: training",
        "a run's validation rows are not trained on",
        "bp-data/src/bp_data/loop/plan.py",
        "for place in range(len(rows)) if place not in chosen)",
        "for place in range(len(rows)))",
        "bp-data/tests/test_data_plan.py::test_the_same_rows_are_held_out_each_time_and_they_are_those_of_split_rows",
    ),
    Mutation(
        "held-out rows: copies",
        "rows with the same text stay on one side",
        "bp-data/src/bp_data/loop/plan.py",
        "                chosen.update(dict.fromkeys(same))\n",
        "                chosen[place] = None\n",
        "bp-data/tests/test_data_plan.py::test_rows_with_the_same_text_stay_on_one_side",
    ),
    Mutation(
        "row counts",
        "rows that no step gets to are counted as not reached",
        "bp-data/src/bp_data/loop/plan.py",
        "return self.units if steps >= self.steps_per_epoch else min",
        "return self.units if steps else min",
        "bp-data/tests/test_data_plan.py::test_rows_of_each_kind_are_counted_once",
    ),
    Mutation(
        "truncation",
        "a truncated chat keeps an end token where it can",
        "bp-data/src/bp_data/overflow.py",
        "            return place + 1\n",
        "            return place\n",
        "bp-data/tests/test_data_store.py::test_a_cut_keeps_the_terminator_where_it_can",
    ),
    # Merging and folding
    Mutation(
        "fold: scale",
        "the scale of an adapter is PEFT's, also with rsLoRA",
        "bp-merge/src/bp_merge/adapter.py",
        'alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r',
        "alpha / r",
        "bp-merge/tests/test_merge_fold.py::test_scales_follow_peft",
    ),
    Mutation(
        "fold: bytes",
        "a merged model has PEFT's bytes",
        "bp-merge/src/bp_merge/fold.py",
        "add_in_order(raw, dtype, b, pair.a, pair.scale)",
        "add_in_order(raw, dtype, b, pair.a, pair.scale * 1.01)",
        "bp-merge/tests/test_merge_fold.py::test_fold_is_pefts_merge_bit_for_bit",
    ),
    Mutation(
        "slao",
        "run i counts 1/√i in a stream",
        "bp-merge/src/bp_merge/slao.py",
        "np.float32(1 / math.sqrt(i))",
        "np.float32(1 / i)",
        "bp-merge/tests/test_merge_slao.py::test_merges_in_turn_are_a_weighted_sum",
    ),
    Mutation(
        "ties",
        "TIES averages only the entries that agree with the elected sign",
        "bp-merge/src/bp_merge/ties.py",
        "np.where(is_positive, change > 0, change < 0)",
        "change != 0",
        "bp-merge/tests/test_merge_methods.py::test_ties_is_mergekits",
    ),
    Mutation(
        "dare",
        "DARE rescales what it keeps",
        "bp-merge/src/bp_merge/dare.py",
        "np.float32(weight / plan.density)",
        "np.float32(weight)",
        "bp-merge/tests/test_merge_methods.py::test_dare_drops_and_rescales",
    ),
    # Export: the file is the trained model
    Mutation(
        "parity: template",
        "the GGUF's template gives the token ids of training",
        "bp-export/src/bp_export/parity.py",
        "for name, ours, theirs in pairs if ours != theirs]",
        "for name, ours, theirs in pairs if not ours]",
        "bp-export/tests/test_export_parity.py::test_another_splitting_rule_is_noticed",
    ),
    Mutation(
        "parity: divergence",
        "a GGUF with wrong weights fails the parity gate",
        "bp-export/src/bp_export/parity.py",
        '"passed" if mean <= bound.divergence else "failed"',
        '"passed" if mean >= 0 else "failed"',
        "bp-export/tests/test_export_parity.py::test_damaged_weights_are_noticed",
    ),
    Mutation(
        "parity: effect",
        "a GGUF without the adapter fails the parity gate",
        "bp-export/src/bp_export/parity.py",
        'return _judge("effect", max(0.0, 1 - left / effect), 0.5, note)',
        'return _judge("effect", max(0.0, 1 - left / effect), 0.0, note)',
        "bp-export/tests/test_export_parity.py::test_a_lost_adapter_is_noticed",
    ),
    Mutation(
        "quantization",
        "quantized tensors are llama-quantize's bytes",
        "bp-export/src/bp_export/kquants.py",
        "steps = np.minimum(_round(factor[:, None] * scales), 127).astype(np.int8)",
        "steps = np.minimum(np.floor(factor[:, None] * scales), 127).astype(np.int8)",
        "bp-export/tests/test_export_kernels.py::test_all_engines_give_ggmls_bytes",
    ),
    # Runs: nothing is lost
    Mutation(
        "fsync",
        "a checkpoint is on the disk before it has its name",
        "bp-runs/src/bp_runs/checkpoint.py",
        "            fsync_file(path)\n            name = path",
        "            name = path",
        "bp-runs/tests/test_runs_checkpoint.py::test_every_byte_is_on_the_disk_before_the_name_is",
    ),
    Mutation(
        "damaged checkpoint",
        "a run never resumes from a damaged checkpoint",
        "bp-runs/src/bp_runs/checkpoint.py",
        'if file.stat().st_size != saved["bytes"] or sha256_file(file) != saved["sha256"]:',
        'if file.stat().st_size != saved["bytes"]:',
        "bp-runs/tests/test_runs_checkpoint.py::test_a_damaged_one_is_passed_over",
    ),
    Mutation(
        "best checkpoint",
        "the checkpoint with the lowest validation loss stays",
        "bp-runs/src/bp_runs/checkpoint.py",
        "kept.add(min(scored,",
        "kept.add(max(scored,",
        "bp-runs/tests/test_runs_checkpoint.py::test_the_last_the_best_and_the_protected_stay",
    ),
    Mutation(
        "atomic files",
        "a full disk leaves the old file",
        "bp-runs/src/bp_runs/files.py",
        '    partial = _beside(path, "partial")\n    with coded_disk_errors(path):\n        try:\n            with partial.open',
        "    partial = path\n    with coded_disk_errors(path):\n        try:\n            with partial.open",
        "bp-runs/tests/test_runs_files.py::test_a_full_disk_keeps_the_old_file",
    ),
    Mutation(
        "resume: same data",
        "a run doesn't resume on changed data",
        "bp-runs/src/bp_runs/writer.py",
        "if n in before and before[n] != now[n]}",
        "if n in before and before[n] is None}",
        "bp-runs/tests/test_runs_resume.py::test_changed_data_leaves_the_run_as_it_stood",
    ),
    Mutation(
        "redaction",
        "credentials in URLs never reach a record",
        "bp-runs/src/bp_runs/redact.py",
        '    text = _URL_CREDENTIALS.sub(rf"\\1{MASK}@", text)\n',
        "",
        "bp-runs/tests/test_runs_redact.py::test_named_secrets_are_masked",
    ),
    # Several processes
    Mutation(
        "ranks: signature",
        "ranks take no message that a rank of this launch hasn't signed",
        "bp-train-cuda/src/bp_train_cuda/distributed/store.py",
        "if not hmac.compare_digest(signature, self._signature(body).encode()):",
        "if not signature:",
        "bp-train-cuda/tests/test_cuda_ranks_store.py::test_a_changed_value_is_rejected",
    ),
    Mutation(
        "ranks: replay",
        "a signed message counts under its own key only",
        "bp-train-cuda/src/bp_train_cuda/distributed/store.py",
        'if found["key"] != self._full(key):',
        'if not found["key"]:',
        "bp-train-cuda/tests/test_cuda_ranks_store.py::test_a_value_is_not_taken_for_another_key_or_another_rank",
    ),
    Mutation(
        "ranks: address",
        "rank 0's store listens on the address given only",
        "bp-train-cuda/src/bp_train_cuda/distributed/store.py",
        "listener.bind(place)",
        'listener.bind(("0.0.0.0", ranks.port))',
        "bp-train-cuda/tests/test_cuda_ranks_store.py::test_the_store_listens_on_the_address_given_alone",
    ),
    Mutation(
        "ranks: token",
        "only this user can read the ranks' token",
        "backpropagate/src/backpropagate/rendezvous.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)",
        "backpropagate/tests/test_tool_rendezvous.py::test_only_this_user_can_read_it",
    ),
    Mutation(
        "ranks: gradients",
        "two processes train the weights of one with twice the rows",
        "bp-train-cuda/src/bp_train_cuda/distributed/process_group.py",
        "        dist.all_reduce(joined)\n",
        "        dist.broadcast(joined, src=0)\n",
        "bp-train-cuda/tests/test_cuda_several.py::test_two_ranks_are_one_with_twice_the_rows_and_end_together",
    ),
    Mutation(
        "ranks: sharded gradients",
        "two processes under FSDP2 train the weights of one with twice the rows",
        "bp-train-cuda/src/bp_train_cuda/distributed/sharding.py",
        "local_shard(weight.grad).mul_(dist.get_world_size())",
        "local_shard(weight.grad).mul_(1)",
        "bp-train-cuda/tests/test_cuda_several.py::test_two_ranks_are_one_with_twice_the_rows_and_end_together",
    ),
    # Memory, settings, evaluation
    Mutation(
        "estimate",
        "estimate-vram is near what was measured",
        "bp-train-cuda/src/bp_train_cuda/estimate.py",
        "FRAGMENTS = 0.05",
        "FRAGMENTS = 0.5",
        "bp-train-cuda/tests/test_cuda_estimate_measured.py",
    ),
    Mutation(
        "packing proof",
        "a model that mixes packed examples is rejected",
        "bp-train-cuda/src/bp_train_cuda/model/packing.py",
        "if max(moved, off) <= self._tolerance():",
        "if min(moved, off) <= 1:",
        "bp-train-cuda/tests/test_cuda_model_packing.py::test_low_precision_hides_no_leak",
    ),
    Mutation(
        "settings",
        "a flag wins over the environment",
        "backpropagate/src/backpropagate/settings.py",
        '        ("env", _from_env(environ)),\n        ("flag", _from_flags(known, flags)),\n',
        '        ("flag", _from_flags(known, flags)),\n        ("env", _from_env(environ)),\n',
        "backpropagate/tests/test_tool_settings.py::test_each_source_reaches_each_setting_and_the_nearer_wins",
    ),
    Mutation(
        "eval",
        "eval says better or worse only if the whole interval does",
        "backpropagate/src/backpropagate/comparing.py",
        "verdict = down if high < 0 else up if low > 0 else",
        "verdict = down if low < 0 else up if high > 0 else",
        "backpropagate/tests/test_tool_eval.py::test_a_clear_gain_a_clear_loss_and_neither",
    ),
)
