"""The package's face: its public names, and that it needs no framework."""

import subprocess
import sys

from merge_pico import SHAPES, write_drawn

import bp_merge


def test_all_is_real():
    assert all(hasattr(bp_merge, name) for name in bp_merge.__all__)


BLOCK = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "safetensors"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""
WORK = """
import sys
from pathlib import Path
import numpy as np
#BLOCK
from bp_merge import METHODS, FoldedModel, TensorReader, load_adapter, merge_adapters, read_model_index, write_tensors

def merge_and_fold(folders, out, shapes):
    (out / "base").mkdir(parents=True)
    ones = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    write_tensors(out / "base" / "model.safetensors", ones, dtype="F32")
    for method in METHODS:
        merge_adapters(folders, out / method, run_id="r1", method=method)
        with FoldedModel(TensorReader(read_model_index(out / "base")), load_adapter(out / method)) as model:
            for name, weight in ones.items():
                np.save(out / f"{method}-{name}.npy", model.read_rows(name, 0, len(weight)))
"""


def test_it_works_where_frameworks_cannot_be_imported(tmp_path):
    """Every method merges, and the result folds into a base, to the same bytes as with frameworks installed."""
    folders = [str(write_drawn(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    calls = [
        f"merge_and_fold([Path(folder) for folder in {folders!r}], Path({str(tmp_path / out)!r}), {SHAPES!r})"
        for out in ("with", "without")
    ]
    exec(WORK + calls[0], {})
    subprocess.run([sys.executable, "-c", WORK.replace("#BLOCK", BLOCK) + calls[1]], check=True)
    written = [path for path in (tmp_path / "with").rglob("*") if path.suffix in {".safetensors", ".npy"}]
    assert len(written) == 1 + len(bp_merge.METHODS) * (1 + len(SHAPES))
    for path in written:
        assert path.read_bytes() == (tmp_path / "without" / path.relative_to(tmp_path / "with")).read_bytes(), path
