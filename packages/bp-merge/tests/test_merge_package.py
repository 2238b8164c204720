"""The package's face: its public names, and that it needs no framework."""

import subprocess
import sys

import bp_merge


def test_all_is_real():
    assert all(hasattr(bp_merge, name) for name in bp_merge.__all__)


def test_it_imports_where_frameworks_cannot_be():
    script = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "safetensors"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import bp_merge
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
