"""`backprop info`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backpropagate import rails, system
from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.settings import TOML_FILE, resolve
from bp_runs.errors import UserError
from bp_runs.redact import redact


def info(*, json: Json = False) -> int:
    """Show versions, rails, the machine and paths: what a bug report needs."""
    from bp_export.quant import describe_kernels

    machine = system.describe_machine()
    versions = system.installed_versions()
    statuses = rails.all_rails()
    home = system.program_home(os.environ)
    changed = _changed_settings()
    if json:
        body = {
            "machine": machine,
            "kernels": describe_kernels(),
            "versions": versions,
            "rails": [{"name": s.name, **asdict(s.probe)} for s in statuses],
            "home": str(home),
            "offline": system.is_offline(os.environ),
            "settings": changed,
        }
        print_json("info", body)
        return 0
    lines = [f"  {k:<9} {v}" for k, v in machine.items() if k != "memory"]
    if machine["memory"]:
        lines.append(f"  memory    {machine['memory'] / 2**30:.1f} GiB")
    lines.append(f"  kernels   {describe_kernels()}, for the export's quantization")
    lines.append(f"  home      {home}")
    lines += [
        "settings",
        *([] if changed else ["  all at their defaults"]),
        *(f"  {key} = {row['value']} ({row['source']})" for key, row in changed.items()),
    ]
    lines.append("rails")
    lines += [f"  {s.name:<9} {'usable' if s.probe.usable else 'unusable'}: {s.probe.why}" for s in statuses]
    lines.append("versions")
    lines += [f"  {name:<15} {number}" for name, number in versions.items()]
    print(redact("\n".join(["machine", *lines])))  # noqa: T201
    return 0


def _changed_settings() -> dict[str, Any]:
    """What the environment and backpropagate.toml set, or the error that reading them is."""
    try:
        found = resolve({}, os.environ, Path(TOML_FILE)).to_record()
    except UserError as error:
        return {"error": {"value": str(error), "source": error.code}}
    return {key: row for key, row in found.items() if row["source"] != "default"}
