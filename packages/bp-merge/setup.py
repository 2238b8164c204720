"""The compiled rows, where a C compiler is at hand; without one the package installs all the same, and is slower."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# One wheel for all versions of CPython. Free-threaded builds have no limited API, so each version needs its own wheel;
# nor have other Pythons.
HAS_LIMITED_API = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")

rows = Extension(
    "bp_merge._rows",
    ["native/rows.c"],
    depends=["native/rows.h"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if HAS_LIMITED_API else [],
    # Each float operation decides bits: what is to be fused says so itself.
    extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"],
    py_limited_api=HAS_LIMITED_API,
    optional=True,
)


class Build(build_ext):
    """On Windows zig compiles, from the package ziglang: Microsoft's compiler does not know GCC's vectors."""

    def build_extension(self, extension: Extension) -> None:
        machines = {"win-amd64": "x86_64", "win-arm64": "aarch64"}
        if not self.plat_name.startswith("win"):
            super().build_extension(extension)
            return
        if self.plat_name not in machines:
            raise CompileError(f"zig is not set up for {self.plat_name}")
        built = Path(self.get_ext_fullpath(extension.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        library = "python3.lib" if HAS_LIMITED_API else f"python{sysconfig.get_config_var('VERSION')}t.lib"
        command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-s", "-o", str(built), *extension.sources]
        command += ["-target", f"{machines[self.plat_name]}-windows-gnu", *extension.extra_compile_args]
        command += ["-DMS_WIN64", *(f"-D{name}={value}" for name, value in extension.define_macros)]
        command += [f"-I{folder}" for folder in self.include_dirs]
        command += [str(file) for folder in self.library_dirs if (file := Path(folder) / library).is_file()]
        try:
            subprocess.run(command, check=True)  # noqa: S603  # fixed words and our own paths
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"zig failed: {error}") from error


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[rows],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if HAS_LIMITED_API else {},
)
