"""The command table; each command's module is imported when it is called, and no framework before that."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError, Group

from backpropagate import __version__, system
from backpropagate.cli import process
from backpropagate.cli.error_output import is_terminal_lost, prepare_process, report_bug, report_error, set_up_logs
from backpropagate.cli.global_flags import environment, overview, take_switches
from backpropagate.cli.hint_wording import CommandLineWording
from backpropagate.cli.shorthands import HELP, HELP_ALL, expand
from backpropagate.distributed import launchers
from backpropagate.offline import forbid_network
from bp_runs.errors import CodedError, InterruptedRunError, PathUnusableError
from bp_runs.wording import use_wording

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the command table."""

    name: str
    target: str
    """``module:function`` under `backpropagate.cli`."""
    line: str
    """For the overview; a lazy command's own text is not read before it is called."""
    example: str


COMMANDS = (
    Command(
        "quickstart",
        "quickstart:quickstart",
        "Try it: train, export and chat with a small model.",
        "backprop quickstart --output ./quickstart",
    ),
    Command(
        "train",
        "train:train",
        "Train an adapter on your data.",
        "backprop train --data my_data.jsonl --model Qwen/Qwen2.5-7B-Instruct --steps 100",
    ),
    Command(
        "multi-run",
        "multi_run:multi_run",
        "Train on several datasets in sequence and merge with SLAO.",
        "backprop multi-run --data my_data.jsonl --runs 5 --steps 100 --samples 1000",
    ),
    Command(
        "merge",
        "merge:merge",
        "Merge adapters of one base into one adapter.",
        "backprop merge week1/lora week2/lora --method ties --density 0.2 --output merged",
    ),
    Command(
        "export",
        "export:export",
        "Write a GGUF, merged model or adapter; register it in Ollama.",
        "backprop export ./output/lora --format gguf --quantization q4_k_m --ollama --ollama-name my-model",
    ),
    Command(
        "imatrix",
        "imatrix:imatrix",
        "Measure an importance matrix, for export --imatrix.",
        "backprop imatrix ./output/lora --text calibration.txt",
    ),
    Command(
        "push",
        "push:push",
        "Upload to the Hugging Face Hub, with a model card.",
        "backprop push ./output/lora --repo me/my-model --private",
    ),
    Command(
        "chat",
        "chat:chat",
        "Chat with an adapter, model, GGUF, or one in Ollama.",
        'backprop chat ./output/lora --prompt "What is the capital of France?"',
    ),
    Command(
        "ollama register",
        "ollama:register",
        "Register a GGUF, or an adapter for Ollama, under a name.",
        "backprop ollama register ./output/model-q4_k_m.gguf my-model",
    ),
    Command("ollama list", "ollama:list_", "List the models that Ollama has.", "backprop ollama list"),
    Command("ollama rm", "ollama:rm", "Remove a model from Ollama.", "backprop ollama rm my-model"),
    Command(
        "eval",
        "eval:eval_",
        "Compare an adapter with its base model on held-out data.",
        "backprop eval ./output/lora --data heldout.jsonl --gate not-worse",
    ),
    Command(
        "validate",
        "validate:validate",
        "Check a data file; list every row that training would not take.",
        "backprop validate my_data.jsonl --model Qwen/Qwen2.5-7B-Instruct",
    ),
    Command(
        "data doctor",
        "data:doctor",
        "Examine a data file on one page, with a fix for each finding.",
        "backprop data doctor my_data.csv --model Qwen/Qwen2.5-7B-Instruct",
    ),
    Command(
        "data preview",
        "data:preview",
        "Show rows token by token: what is trained, what is only read, what is cut off.",
        "backprop data preview my_data.jsonl --model Qwen/Qwen2.5-7B-Instruct --rows 3",
    ),
    Command(
        "data report",
        "data:report",
        "Report on a data file; fail if it breaks a limit.",
        "backprop data report my_data.jsonl --html report.html --max-duplicates 0.01",
    ),
    Command(
        "data split",
        "data:split",
        "Split a data file in two; equal examples stay together.",
        "backprop data split my_data.jsonl --output train.jsonl --heldout test.jsonl",
    ),
    Command(
        "data clean",
        "data:clean",
        "Write the usable examples; list what was left out.",
        "backprop data clean my_data.jsonl --output clean.jsonl",
    ),
    Command(
        "data convert",
        "data:convert",
        "Convert every example to one format.",
        "backprop data convert my_data.csv --to messages --output my_data.jsonl",
    ),
    Command("list-runs", "runs:list_runs", "List the runs of an output folder.", "backprop list-runs --limit 5"),
    Command(
        "show-run",
        "runs:show_run",
        "Show one run in full; part of its id is enough.",
        "backprop show-run 20261123 --output ./output",
    ),
    Command(
        "resume",
        "resume:resume",
        "Resume an interrupted run.",
        "backprop resume 20261123 --output ./output",
    ),
    Command(
        "replay",
        "resume:replay",
        "Rerun a past run, optionally with changed settings.",
        "backprop replay 20261123 --override lr=1e-4 --override lora.r=8",
    ),
    Command(
        "extend",
        "resume:extend",
        "Train a finished run for more steps.",
        "backprop extend 20261123 --steps +100",
    ),
    Command(
        "diff-runs",
        "diff_runs:diff_runs",
        "Compare two runs.",
        "backprop diff-runs 9f2c1a 77b0de",
    ),
    Command(
        "prove",
        "prove:prove",
        "Check a run's losses in an independent training loop.",
        "backprop prove 20261123 --steps 10",
    ),
    Command(
        "export-runs",
        "export_runs:export_runs",
        "Write all runs of an output folder to one file.",
        "backprop export-runs --format csv --to runs.csv",
    ),
    Command("runs rm", "runs:rm", "Delete runs with their adapters and checkpoints.", "backprop runs rm 9f2c1a 77b0de"),
    Command("runs tag", "runs:tag", "Add tags to a run, or remove them.", "backprop runs tag 9f2c1a good pirate"),
    Command("runs note", "runs:note", "Add a note to a run.", 'backprop runs note 9f2c1a "the one that we ship"'),
    Command("runs name", "runs:name", "Name a run.", 'backprop runs name 9f2c1a "Pirate, more data"'),
    Command(
        "runs protect",
        "runs:protect",
        "Protect a checkpoint from removal.",
        "backprop runs protect 9f2c1a --step 50",
    ),
    Command(
        "runs import",
        "runs:import_",
        "Import runs from 1.x (safe to repeat).",
        "backprop runs import ./old-output/run_history.json",
    ),
    Command(
        "queue add",
        "queue:add",
        "Add a command to the queue; its flags are checked now.",
        "backprop queue add train --data week1.jsonl --output week1",
    ),
    Command("queue run", "queue:run", "Run the queued jobs; an error does not stop the next.", "backprop queue run"),
    Command("queue list", "queue:list_", "List the jobs and their results.", "backprop queue list"),
    Command("queue rm", "queue:rm", "Remove jobs from the queue.", "backprop queue rm --ended"),
    Command(
        "config show",
        "config:show",
        "Show every setting, its value and its source.",
        "backprop config show --changed",
    ),
    Command(
        "config explain",
        "config:explain",
        "Explain one setting: value, source, default, and its names.",
        "backprop config explain lora.r",
    ),
    Command(
        "models",
        "models:models",
        "Base models that train well, with license and memory.",
        "backprop models --json",
    ),
    Command(
        "download",
        "download:download",
        "Download a base model before a run needs it.",
        "backprop download qwen2.5-7b",
    ),
    Command(
        "estimate-vram",
        "estimate_vram:estimate_vram",
        "Estimate GPU memory without loading the model.",
        "backprop estimate-vram qwen2.5-7b --vram 16 --mode qlora --max-seq-length 4096",
    ),
    Command(
        "ui",
        "ui:ui",
        "Open the web UI: train, watch and compare runs, export.",
        "backprop ui --output ./output",
    ),
    Command(
        "doctor",
        "doctor:doctor",
        "Check that this machine can train and export.",
        "backprop doctor --offline",
    ),
    Command("info", "info:info", "Show versions, backends and hardware, for bug reports.", "backprop info --json"),
    Command(
        "report",
        "report:report",
        "Write a redacted zip about a run, for a bug report.",
        "backprop report 20261123 --to report.zip",
    ),
    Command("errors", "errors:errors", "Explain the error codes.", "backprop errors INPUT_DATASET_NOT_FOUND"),
)

# Commands of two words stand together under the first.
GROUPS = {
    "data": "Inspect, split, clean or convert data files.",
    "runs": "Remove, tag, name, annotate, protect and import runs.",
    "queue": "Queue runs and run them one after another.",
    "config": "Show the settings and where their values come from.",
    "ollama": "Register, list and remove models in Ollama.",
}

# The panels of the overview, in their order; the first word of each command is in one.
PANELS = {
    "Train": ("quickstart", "train", "multi-run", "resume", "replay", "extend", "eval", "queue"),
    "Data": ("validate", "data"),
    "Export and chat": ("export", "merge", "imatrix", "push", "chat", "ollama"),
    "Runs": ("list-runs", "show-run", "diff-runs", "prove", "export-runs", "runs", "ui"),
    "This machine": ("doctor", "info", "models", "download", "estimate-vram", "config", "errors", "report"),
}

_EPILOGUE = f"Before or after every command:\n{overview()}"


def build_app() -> App:
    """The whole command line, without any command's imports."""
    app = App(
        name="backprop",
        help="Fine-tune a language model on one GPU and have it running in Ollama.",
        help_epilogue=_EPILOGUE,
        help_format="plaintext",
        group_parameters=Group("Parameters", sort_key=-1, help_formatter=_show_usual_names),
        suppress_keyboard_interrupt=False,
        version=__version__,
        version_flags=["--version", "-V"],
    )
    beside = Group("Global options", sort_key=len(PANELS))
    app.command(
        "backpropagate.cli.completion:install_completion",
        name="--install-completion",
        help="Let your shell complete commands, flags and choices.",
        group=beside,
    )
    for name in ("--help", "--version"):
        app[name].group = beside
    panels: dict[str, Group] = {}
    for place, (title, names) in enumerate(PANELS.items()):
        panels |= dict.fromkeys(names, Group(title, sort_key=place))
    order = list(panels)
    groups = {
        name: App(
            name=name,
            help=line,
            help_format="plaintext",
            help_epilogue="",
            group=panels[name],
            sort_key=order.index(name),
        )
        for name, line in GROUPS.items()
    }
    for group in groups.values():
        app.command(group)
    for command in COMMANDS:
        target = f"backpropagate.cli.{command.target}"
        first, _, name = command.name.rpartition(" ")
        panel = None if first else panels[name]
        sort_key = None if first else order.index(name)
        epilogue = f"Example:\n  {command.example}"
        groups.get(first, app).command(
            target, name=name, help=command.line, help_epilogue=epilogue, group=panel, sort_key=sort_key
        )
    return app


def _show_usual_names(console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
    from backpropagate.cli.flags import show_usual_names  # reads the settings, which most command lines do not need

    show_usual_names(console, options, panel)


def _explain_in_full(app: App, words: Sequence[str]) -> None:
    """Put a command's whole docstring on its own page; the overview, which imports no command, has one line of each."""
    known = {command.name for command in COMMANDS}
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
    if name is None:
        return
    for word in name.split():
        app = app[word]
    text = (inspect.getdoc(app.default_command) or "").partition("\n\nParameters\n")[0]
    app.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _choose_flags(app: App, words: Sequence[str]) -> None:
    """Let a long page of help show the flags that most people need, and say how to see the others."""
    if words[0] not in {command.name for command in COMMANDS}:
        return
    from backpropagate.cli.flags import COMMON_FLAGS, show_only

    common = None if HELP_ALL in words else COMMON_FLAGS.get(words[0])
    show_only(common)
    if common is not None:
        page = app[words[0]]
        page.help_epilogue = f"More flags: backprop {words[0]} {HELP_ALL}\n\n{page.help_epilogue}"


def run(argv: Sequence[str]) -> int:
    """Carry out one command line and return its exit status; every error has been shown."""
    with use_wording(CommandLineWording()):
        return _run_switched(argv)


def _run_switched(argv: Sequence[str]) -> int:
    as_json = "--json" in argv
    try:
        line = take_switches(argv)
    except CodedError as error:
        return report_error(error, as_json=as_json)
    with environment({**line.environ, **process.offline_variables({**os.environ, **line.environ})}):
        if any("_LOG_" in name for name in line.environ):
            try:
                set_up_logs(os.environ)
            except CodedError as error:
                return report_error(error, as_json=as_json)
        with forbid_network(wanted=system.is_network_forbidden(os.environ)):
            return _run_together(line.argv, as_json=as_json)


def _run_together(argv: Sequence[str], *, as_json: bool) -> int:
    """As `_run`; of several processes the main one does it, and the others take part in what it trains."""
    try:
        process.require_command(argv)
        ranks = process.read_ranks()
        if ranks is not None and ranks.rank:
            with process.stop_on_interrupt()() as stop:
                launchers.follow(ranks, stop)
            return 0
    except KeyboardInterrupt:
        return InterruptedRunError.exit_status
    except CodedError as error:
        if process.is_main():
            return report_error(error, as_json=as_json)
        return launchers.wait_for_launcher(error.exit_status)
    return _run(argv, as_json=as_json)


def _run(argv: Sequence[str], *, as_json: bool) -> int:
    try:
        result = _call(argv)
    except CycloptsError as error:
        from backpropagate.cli.usage_errors import explain

        return report_error(explain(error, [command.name for command in COMMANDS]), as_json=as_json)
    except CodedError as error:
        return report_error(error, as_json=as_json)
    except KeyboardInterrupt:
        return report_error(InterruptedRunError("interrupted"), as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if is_terminal_lost(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return InterruptedRunError.exit_status
        if error.filename is None:
            return report_bug(error, as_json=as_json)
        refusal = PathUnusableError(f"the system rejects {error.filename}", cause=error.strerror)
        return report_error(refusal, as_json=as_json)
    except Exception as error:  # noqa: BLE001  # an edge: whatever is left is a bug, and the user gets a report to send
        return report_bug(error, as_json=as_json)
    return result if isinstance(result, int) else 0


def _call(argv: Sequence[str]) -> object:
    if not argv:
        from backpropagate.cli.flags import output_folder
        from backpropagate.cli.next_steps import print_next_steps

        return print_next_steps(output_folder(None))
    words = expand(argv)
    app = build_app()
    if {HELP, HELP_ALL, "-h"} & set(words):
        _explain_in_full(app, words)
        _choose_flags(app, words)
        words = [HELP if word == HELP_ALL else word for word in words]
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False, help_on_error=False)
    _end_start()
    return command(*bound.args, **bound.kwargs)


def _end_start() -> None:
    """Collect garbage from now on, see `backpropagate.cli.main`; what is there by now stays, and is not searched."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def main() -> None:
    """Carry out the process's own command line and leave with its exit status."""
    try:
        prepare_process()
    except CodedError as error:
        sys.exit(report_error(error, as_json="--json" in sys.argv))
    sys.exit(run(sys.argv[1:]))
