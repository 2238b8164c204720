"""The run store's costs as ratios, measured in turn in one run.

    uv run python benchmarks/runs.py [--runs 9] [--json]

`backprop list-runs` and `show-run` against `python -c pass`, in a folder of 10,000 recorded runs with 1,000 metrics
each; and what recording a step costs against a step of the smallest model that anybody trains, and of a pico model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from bp_runs import paths
from bp_runs.events import StepDone
from bp_runs.record import RunRecord, write_record
from bp_runs.store import RunStore

RUNS, METRICS = 10_000, 1_000


def step_event(step: int) -> StepDone:
    return StepDone(
        step=step, steps=METRICS, loss=1 + 3 / step, learning_rate=2e-4, grad_norm=1.0, tokens=4096 * step,
        tokens_per_second=5000.0, memory_bytes=7 * 2**30,
    )  # fmt: skip


def fill(output: Path) -> str:
    """Write the runs and their index; returns the last id. All share the bytes of one metrics file, by links."""
    shared = output / "metrics"
    output.mkdir(parents=True)
    shared.write_text("".join(json.dumps({"at": "", **step_event(s).to_dict()}) + "\n" for s in range(1, METRICS + 1)))
    run_id = ""
    for number in range(RUNS):
        run_id = f"20260101-{number:06d}-{number:06x}"
        folder = paths.run_folder(output, run_id)
        folder.mkdir(parents=True)
        record = RunRecord(
            run_id=run_id,
            status="completed",
            rail="cuda",
            settings={"model.name": {"value": "owner/model", "source": "flag"}},
            result={"steps": METRICS, "first_loss": 3.0, "final_loss": 1.0, "seconds": 60.0},
        )
        # Straight to the disk: 10,000 fsyncs are not what is measured here.
        (folder / paths.RECORD_FILE).write_text(json.dumps(record.to_dict()))
        os.link(shared, folder / paths.METRICS_FILE)
    RunStore(output).rebuild_index()
    write_record(paths.run_folder(output, run_id), record)
    return run_id


def take_turns(cases: dict[str, list[str]], runs: int) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of each case; a slow minute hits all of them. The first turn warms the caches."""
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(runs + 1):
        for name, command in cases.items():
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if turn:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    base = statistics.median(wall["python -c pass"])
    return {
        name: {
            "wall_ms": 1000 * statistics.median(wall[name]),
            "wall_ms_least": 1000 * min(wall[name]),
            "wall_ms_most": 1000 * max(wall[name]),
            "cpu_ms": 1000 * statistics.median(cpu[name]),
            "ratio": statistics.median(wall[name]) / base,
        }
        for name in cases
    }


def time_emit(output: Path) -> float:
    """CPU seconds of recording one step, the write included."""
    with RunStore(output).start(settings={}, rail="bench") as run:
        return per_call(lambda: run.emit(step_event(1)), 5000)


def per_call(call: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def time_step(folder: Path) -> float:
    """CPU seconds of a step of the pico model of the tests (two layers, hidden 64, two short rows a step)."""
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "packages/bp-train-cuda/tests")]
    from conftest import write_pico_tokenizer
    from cuda_training import spec_for
    from transformers import LlamaConfig, LlamaForCausalLM

    from bp_train_cuda import CudaRail

    base = folder / "pico"
    base.mkdir()
    size = write_pico_tokenizer(base)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    data = folder / "d.jsonl"
    row = {"messages": [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "captain marlow"}]}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    times: list[float] = []

    def emit(event: object) -> None:
        if isinstance(event, StepDone):
            times.append(time.process_time())

    CudaRail().train(spec_for(base, data, folder / "run", training={"steps": 60, "batch_size": 2}), emit, lambda: False)
    return statistics.median(b - a for a, b in pairwise(times[5:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / "out"
        run_id = fill(output)
        program = [sys.executable, "-m", "backpropagate"]
        cases = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "backprop --help": [*program, "--help"],
            "backprop list-runs": [*program, "list-runs", "--output", str(output)],
            "backprop show-run": [*program, "show-run", run_id, "--output", str(output)],
        }
        found = take_turns(cases, arguments.runs)
        emit, step = time_emit(folder / "one"), time_step(folder)
    recording = {"emit_us": 1e6 * emit, "pico_step_ms": 1e3 * step, "share_of_a_pico_step": emit / step}
    if arguments.json:
        print(json.dumps({"commands": found, "recording": recording}, indent=2))
        return
    for case, numbers in found.items():
        spread = f"{numbers['wall_ms_least']:.0f} to {numbers['wall_ms_most']:.0f}"
        print(
            f"{case:22} {numbers['wall_ms']:7.0f} ms ({spread})  CPU {numbers['cpu_ms']:5.0f} ms  {numbers['ratio']:5.1f} x"
        )
    print(
        f"recording a step: {1e6 * emit:.0f} us of CPU, {100 * emit / step:.2f} % of a pico step of {1e3 * step:.1f} ms"
    )


if __name__ == "__main__":
    main()
