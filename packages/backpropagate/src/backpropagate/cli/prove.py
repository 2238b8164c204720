"""`backprop prove`."""

from __future__ import annotations

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.output import print_json
from backpropagate.proof import failure, prove_run
from bp_runs.proof import Proof
from bp_runs.store import RunStore


def prove(run: str | None = None, *, steps: int = 10, output: Output = None, json: Json = False) -> int:
    """Replay a run's first steps in an independent loop of plain PyTorch, and compare the losses.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has; default: the newest run.
    steps: int
        Optimizer steps to replay; at most those that the run recorded.
    """
    proof = prove_run(RunStore(output_folder(output)), run, steps=steps)
    failed = failure(proof)
    if json:
        print_json("prove", proof.to_dict())
        return failed.exit_status if failed else 0
    print("\n".join(_lines(proof)))  # noqa: T201
    if failed:
        raise failed
    return 0


def _lines(proof: Proof) -> list[str]:
    lines = [f"  run        {proof.run_id}", "", f"  {'step':>5}  {'recorded':>10}  {'replayed':>10}  difference"]
    for step, numbers in enumerate(zip(proof.recorded, proof.replayed, proof.differences, strict=True), 1):
        recorded, replayed, gap = numbers
        lines.append(f"  {step:>5}  {recorded:>10.6f}  {replayed:>10.6f}  {gap:.1e}")
    verdict = "OK" if proof.passed else "FAILED"
    return [
        *lines,
        "",
        f"  largest    {proof.largest:.1e} ({proof.largest_relative:.1e} of the recorded loss)",
        f"  tolerance  {proof.tolerance:g}: {proof.why}",
        f"  verdict    {verdict}",
    ]
