"""What the web page is asked to do: settings of the group ``ui``, which no run records."""

from __future__ import annotations

from dataclasses import dataclass, field

from bp_runs.spec import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class UiSpec:
    """The web page."""

    host: str = setting("127.0.0.1", "Address to listen on; if other machines reach it, auth is needed.")
    port: int = setting(7860, "Port to listen on; 0: any that is free.", at_least=0, at_most=2**16 - 1)
    auth: str | None = field(
        default=None,
        metadata={"help": "Name and password that the page asks for, as user:password.", "secret": True},
    )
    share: bool = setting(False, "Let other machines of this network see the page: listen on every address.")
    allowed_hosts: tuple[str, ...] = setting((), "Further names that the page is asked for by, as behind a proxy.")
    output: tuple[str, ...] = setting((), "Output folders whose runs are shown; default: training.output_dir.")
    output_dir: str | None = setting(
        None, "The folder that the page writes in; default: ui-outputs in the program's home, ~/.backpropagate."
    )
    data_dirs: tuple[str, ...] = setting(
        (), "Folders whose data files and models the page may read; default: the one that it is started in."
    )
