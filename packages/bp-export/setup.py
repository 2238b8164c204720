"""The compiled kernels, where a C compiler is at hand; without one the package installs all the same, and is slower."""

import sys
import sysconfig

from setuptools import Extension, setup

# One wheel for all versions of CPython. Free-threaded builds have no limited API, so each version needs its own wheel;
# nor have other Pythons.
HAS_LIMITED_API = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")

kernels = Extension(
    "bp_export._kernels",
    ["native/kernels.c"],
    depends=["native/scalars.h", "native/lanes.h", "native/kquants.h", "native/eights.h"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if HAS_LIMITED_API else [],
    # Each float operation decides bits, so that multiplications and additions must not be fused.
    extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"],
    py_limited_api=HAS_LIMITED_API,
    optional=True,
)

# Microsoft's compiler does not know the vectors that the source is written in: a wheel of Windows is Python alone.
MODULES = [] if sysconfig.get_platform().startswith(("win", "mingw")) else [kernels]

setup(
    ext_modules=MODULES,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if MODULES and HAS_LIMITED_API else {},
)
