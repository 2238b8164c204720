"""The two compiled modules: which wheel each Python builds, and what they say of threads."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bp_export.quant import kernels
from bp_export.quant.kernels import TensorType, quantize_rows
from bp_merge import product
from bp_merge.product import multiply_in_order

PACKAGES = Path(__file__).parents[2]
# Stops before anything is built; what a Python says of itself is all that setup.py asks.
READ_SETUP = """
import setuptools  # first: it brings the distutils that it needs
import distutils.core, json, os, sys, sysconfig

os.chdir(sys.argv[1])
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = int(sys.argv[2])
sysconfig.get_platform = lambda: sys.argv[3]
found = distutils.core.run_setup("setup.py", stop_after="config")
tag = found.get_option_dict("bdist_wheel").get("py_limited_api", [None, None])[1]
print(json.dumps([[[m.py_limited_api, dict(m.define_macros)] for m in found.ext_modules or []], tag]))
"""


@pytest.mark.parametrize(
    ("is_free", "platform", "built"),
    [
        (0, "linux-x86_64", [[[True, {"Py_LIMITED_API": "0x030B0000"}]], "cp311"]),
        (1, "macosx-11.0-arm64", [[[False, {}]], None]),
        (0, "win-amd64", [[[True, {"Py_LIMITED_API": "0x030B0000"}]], "cp311"]),
    ],
)
@pytest.mark.parametrize("package", ["bp-export", "bp-merge"])
def test_which_wheel_each_python_builds(package, is_free, platform, built):
    """One for all versions; a free-threaded Python has no limited API, and Windows no compiler for the source."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    command = [sys.executable, "-W", "ignore", "-c", READ_SETUP, str(PACKAGES / package), str(is_free), platform]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == built


@pytest.mark.skipif(not (kernels.TARGETS and product.ROWS), reason="built without a compiler")
def test_threads_that_compute_at_once_get_the_bytes_that_one_gets():
    random = np.random.default_rng(0)
    kinds = (TensorType.Q4_K, TensorType.Q6_K, TensorType.Q8_0)
    rows = [random.standard_normal((64, 512), np.float32) for _ in range(4)]
    pairs = [(random.standard_normal((200, 16), np.float32), random.standard_normal((16, 300), np.float32))] * 4
    asked = [(quantize_rows, x, kind) for x in rows for kind in kinds] + [(multiply_in_order, *pair) for pair in pairs]
    expected = [work(*words).tobytes() for work, *words in asked]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = pool.map(lambda ask: ask[0](*ask[1:]).tobytes(), asked)
            assert list(found) == expected
