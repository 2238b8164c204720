"""Carry out a Dockerfile's steps without a container engine: in a fresh Debian root, by chroot.

It knows what our Dockerfile uses: FROM with stages, ARG, ENV, WORKDIR, USER, COPY and RUN with mounts.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
_FROM_HERE = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


@dataclass
class Stage:
    """One FROM with its instructions."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def read_dockerfile(text: str) -> list[Stage]:
    """The stages, in order."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name.strip(), base.strip()))
        else:
            stages[-1].steps.append((word, " ".join(rest.split())))
    return stages


@dataclass
class Root:
    """A folder with a system in it, and what the instructions have set."""

    folder: Path
    environment: dict[str, str]
    workdir: str = "/"
    user: str = "0"

    @contextmanager
    def mounted(self, binds: Mapping[str, Path]) -> Iterator[None]:
        """Mount /proc, /dev and folders of this machine for as long as the context lasts."""
        with ExitStack() as stack:
            for target, source in {"/proc": Path("/proc"), "/dev": Path("/dev"), **binds}.items():
                place = self.folder / target.lstrip("/")
                place.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "--rbind", source, place], check=True)
                stack.callback(subprocess.run, ["umount", "-l", place], check=True)
            yield

    def run(
        self, command: str, *, wrapper: tuple[str, ...] = (), check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell line inside, as the user and in the folder that are set."""
        inside = ["chroot", f"--userspec={self.user}:{self.user}", str(self.folder), "/bin/sh", "-c"]
        line = f"cd {shlex.quote(self.workdir)} && {command}"
        done = subprocess.run(
            [*wrapper, *inside, line], env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done


def make_base(folder: Path, passed: Mapping[str, str]) -> Root:
    """A fresh Debian with Python, in place of the image python:…-slim."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", folder],
        check=True,
        capture_output=True,
    )
    for name in _FROM_HERE:
        if Path(name).is_file():
            (folder / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, folder / name.lstrip("/"))
    for file in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        file.unlink()
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8", **passed}
    return Root(folder, environment)


class Builder:
    """Builds the stages that a target needs."""

    def __init__(
        self, stages: list[Stage], context: Path, work: Path, arguments: Mapping[str, str], base: Root
    ) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._context, self._work, self._arguments, self._base = context, work, arguments, base
        self.built: dict[str, Root] = {}

    def build(self, name: str) -> Root:
        """The root of a stage."""
        if name not in self.built:
            stage = self._stages[name]
            below = self.build(stage.base) if stage.base in self._stages else self._base
            folder = self._work / name
            subprocess.run(["cp", "-a", "--reflink=auto", below.folder, folder], check=True)
            root = Root(folder, dict(below.environment), below.workdir, below.user)
            for word, rest in stage.steps:
                self._carry_out(root, word, rest)
            self.built[name] = root
        return self.built[name]

    def _carry_out(self, root: Root, word: str, rest: str) -> None:
        if word == "RUN":
            self._run(root, rest)
        elif word == "COPY":
            self._copy(root, [part for part in rest.split() if not part.startswith("--")], "--chmod=755" in rest)
        elif word == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                root.environment[name] = value.replace("$PATH", root.environment["PATH"])
        elif word == "ARG":
            name, _, value = rest.partition("=")
            root.environment[name] = self._arguments.get(name, value)
        elif word == "WORKDIR":
            root.workdir = rest
            (root.folder / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            root.user = rest
            users = [line.split(":") for line in (root.folder / "etc/passwd").read_text().splitlines()]
            root.environment["HOME"] = next(home for _, _, uid, _, _, home, _ in users if uid == rest)

    def _run(self, root: Root, rest: str) -> None:
        binds = {}
        for options in re.findall(r"--mount=(\S+)", rest):
            given = dict(part.split("=", 1) for part in options.split(","))
            if given["type"] == "bind":
                binds[given["target"]] = self.build(given["from"]).folder / given["source"].lstrip("/")
            else:
                binds[given["target"]] = self._work / "cache"
                binds[given["target"]].mkdir(exist_ok=True)
        with root.mounted(binds):
            root.run(re.sub(r"--mount=\S+ *", "", rest))

    def _copy(self, root: Root, words: list[str], runs: bool) -> None:
        *sources, target = words
        into = root.folder / (target if target.startswith("/") else f"{root.workdir}/{target}").lstrip("/")
        for source in sources:
            found = self._context / source
            if found.is_dir():
                shutil.copytree(found, into, dirs_exist_ok=True)
                continue
            place = into / found.name if target.endswith("/") else into
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, place)
            place.chmod(0o755 if runs else 0o644)
