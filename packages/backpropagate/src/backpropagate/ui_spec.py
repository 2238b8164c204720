"""Settings of the web page, group ``ui``; runs don't record them."""

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
        metadata={"help": "Name and password to log in with, as user:password.", "secret": True},
    )
    auth_file: str | None = setting(
        None, "File whose first line is user:password, which hides it from other users of this machine.", is_path=True
    )
    share: bool = setting(
        False,
        "Let other machines open the page: over cloudflared if it is installed, else on every address of this one.",
    )
    open_browser: bool = setting(False, "Open the page in a browser.")
    allowed_hosts: tuple[str, ...] = setting((), "More host names to answer to, such as a proxy's.")
    trusted_proxies: tuple[str, ...] = setting(
        (), "Addresses of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto headers count."
    )
    output: tuple[str, ...] = setting((), "Output folders whose runs are shown; default: training.output_dir.")
    output_dir: str | None = setting(None, "Folder to write to; default: ~/.backpropagate/ui-outputs.")
    data_dirs: tuple[str, ...] = setting(
        (), "Folders whose data files and models the page may read; default: the current folder."
    )
