"""Where each setting's value comes from: flag > environment > backpropagate.toml > default.

A setting is a field of `backpropagate.continual.spec.RunSettings`; nothing here lists them a second time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_type_hints

from backpropagate import legacy_names
from backpropagate.continual.spec import RunSettings
from backpropagate.errors import OldNameError, SettingsFileError, UnknownSettingError
from backpropagate.presets import find_preset
from backpropagate.suggestions import nearest
from backpropagate.system import path_exists, to_path
from backpropagate.ui_spec import UiSpec
from bp_runs.errors import InvalidSettingError
from bp_runs.record import RunRecord
from bp_runs.redact import MASK
from bp_runs.spec import LORA_PRESETS, LoraSpec, Range, check_value, choices_of, short_name

ENV_PREFIX = "BACKPROPAGATE_"
TOML_FILE = "backpropagate.toml"
Source = Literal["flag", "env", "toml", "preset", "default", "record", "override"]
"""record and override: of a run that is resumed or done again, and what was changed of it."""

# Environment names of the program itself, which are no settings of a run.
PROGRAM_ENV = frozenset({"HOME", "LOG_LEVEL", "LOG_FORMAT", "LOG_FILE", "OFFLINE", "DEBUG", "RANKS_TOKEN"})

TAKES_AUTO = frozenset({"training.batch_size"})
"""Numbers for which ``auto``, as in backpropagate 1.x, means the default."""

_PATHS = ("model.name", "data.path")
_TRACE_SEQ_LENGTH = 8192  # tokens; reasoning is long


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its key, type, default and words."""

    key: str
    type: Any
    default: Any
    help: str
    is_secret: bool = False
    """Whether its value is never shown."""
    aliases: tuple[str, ...] = ()
    """Further names, see `bp_runs.spec.setting`: ``learning_rate``; with a dot, names in another group."""
    is_path: bool = False
    """Whether its value may name a file or folder."""
    range: Range | None = None
    """The numbers that it takes."""

    @property
    def short(self) -> str:
        """Python keyword and, with dashes, the flag: ``lora_r``, ``lr``, ``max_seq_length``."""
        return short_name(self.key)

    @property
    def env(self) -> str:
        """Name in the environment: ``BACKPROPAGATE_LORA__R``."""
        return ENV_PREFIX + self.key.replace(".", "__").upper()

    @property
    def words(self) -> tuple[str, ...]:
        """Its names without a group, the short one first: Python keywords and, with dashes, flags."""
        return (self.short, *(name for name in self.aliases if "." not in name))

    @property
    def other_names(self) -> tuple[str, ...]:
        """Its names that follow from neither its key nor its usual flag: ``learning_rate``, ``lora.random_state``."""
        shown = {self.short} if self.short == self.key.partition(".")[2] else set()
        return tuple(name for name in (self.short, *self.aliases) if name not in shown)

    @property
    def dotted(self) -> tuple[str, ...]:
        """Its names with a group, the key first: ``training.lr``, ``lora.random_state``; TOML and variables."""
        group = self.key.partition(".")[0]
        named = (f"{group}.{word}" for word in self.words)
        return tuple(dict.fromkeys((self.key, *named, *(name for name in self.aliases if "." in name))))


@cache
def all_settings() -> Mapping[str, Setting]:
    """Every setting of a run by dotted key, in the order of `bp_runs.spec`."""
    found: dict[str, Setting] = {}
    for group in fields(RunSettings):
        found |= _settings_of(group.name, get_type_hints(RunSettings)[group.name])
    return MappingProxyType(found)


@cache
def ui_settings() -> Mapping[str, Setting]:
    """Every setting of the web page by dotted key, in the order of `backpropagate.ui_spec`."""
    return MappingProxyType(_settings_of("ui", UiSpec))


def _settings_of(group: str, spec: type[Any]) -> dict[str, Setting]:
    hints = get_type_hints(spec)
    found = {}
    for f in fields(spec):
        default = f.default if f.default is not MISSING else None
        found[f"{group}.{f.name}"] = Setting(
            f"{group}.{f.name}",
            hints[f.name],
            default,
            f.metadata["help"],
            is_secret=f.metadata.get("secret", False),
            aliases=f.metadata.get("aliases", ()),
            is_path=f.metadata.get("is_path", False),
            range=f.metadata.get("range"),
        )
    return found


@cache
def run_names() -> Mapping[str, Setting]:
    """Every setting of a run by each of its names: the one table that all parsers read."""
    return _by_name(all_settings())


@cache
def ui_names() -> Mapping[str, Setting]:
    """As `run_names`, of the web page."""
    return _by_name(ui_settings())


def _by_name(known: Mapping[str, Setting]) -> Mapping[str, Setting]:
    return MappingProxyType({name: s for s in known.values() for name in (*s.words, *s.dotted)})


def find_setting(name: str) -> Setting:
    """The setting by any of its names: key, flag, keyword or variable.

    Raises:
        UnknownSettingError: No setting has the name; the nearest one is named.
    """
    plain = name.removeprefix("--").replace("-", "_").lower()
    own = _from_variable(plain.upper()) if plain.startswith(ENV_PREFIX.lower()) else plain
    found = run_names().get(own) or ui_names().get(own)
    if found is None:
        near = nearest(own, (*run_names(), *ui_names()))
        raise UnknownSettingError(f"there is no setting {name!r}{near}", fix="See them all: {do:config show}")
    return found


def _from_variable(name: str) -> str:
    """A variable's name as one of a setting: ``BACKPROPAGATE_LORA__R`` as ``lora.r``."""
    return name.removeprefix(ENV_PREFIX).replace("__", ".").lower()


def choices(setting: Setting) -> tuple[str, ...]:
    """The words that a setting takes; empty where it takes more than words of a list."""
    return tuple(map(str, choices_of(setting.type)))


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, and where each value came from."""

    settings: RunSettings
    sources: Mapping[str, Source]

    def to_record(self) -> dict[str, dict[str, Any]]:
        """By dotted key: ``{"value": …, "source": …}``."""
        values = self.settings.to_flat()
        values["training.learning_rate"] = self.settings.training.resolved_learning_rate  # what runs
        return {k: {"value": v, "source": self.sources[k]} for k, v in values.items()}


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    toml: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Resolved:
    """Join the four sources into typed settings.

    Args:
        flags: By short name (``lora_r``); None means not given.
        environ: The environment; names that start with ``BACKPROPAGATE_`` are read.
        toml: The settings file; a missing file is no settings.
        defaults: By short name: values that take the place of the settings' own defaults.

    Raises:
        UnknownSettingError: A name that no setting has; the nearest one is named.
        InvalidSettingError: A value of the wrong type or out of range.
        SettingsFileError: The file is not TOML.
    """
    values, sources = _join(all_settings(), flags, environ or {}, toml, defaults or {})
    preset = values.get("lora.preset", LoraSpec().preset)
    if preset in LORA_PRESETS:
        _fill_lora(values, sources, preset)
    if "model.name" in values:
        values["model.name"] = _expand_model(values["model.name"])
    if values.get("data.reasoning_trace") and sources["model.max_seq_length"] == "default":
        values["model.max_seq_length"] = _TRACE_SEQ_LENGTH
    return Resolved(_build(values), MappingProxyType(sources))


def resolve_ui(
    flags: Mapping[str, Any], environ: Mapping[str, str] | None = None, toml: Path | None = None
) -> tuple[UiSpec, Mapping[str, Source]]:
    """Settings of the web page and where each came from; as `resolve`."""
    values, sources = _join(ui_settings(), flags, environ or {}, toml, {})
    return UiSpec(**{key.partition(".")[2]: value for key, value in values.items()}), MappingProxyType(sources)


def _join(
    known: Mapping[str, Setting],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    toml: Path | None,
    defaults: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Values that are set, the nearest source's, and the source of every known setting."""
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(known, "default")
    layers: tuple[tuple[Source, _Layer], ...] = (
        ("default", _from_flags(defaults, known)),
        ("toml", _from_toml(toml)),
        ("env", _from_env(environ)),
        ("flag", _from_flags(flags, known)),
    )
    for source, layer in layers:
        for replaced in _replaced_lengths(layer):
            values.pop(replaced, None)
            sources[replaced] = "default"
        for key, (name, raw) in layer.items():
            if key in known and not (raw == "auto" and key in TAKES_AUTO):
                values[key] = _convert(known[key], raw, source, name)
                sources[key] = source
    return values, sources


_Layer: TypeAlias = Mapping[str, tuple[str, Any]]
"""One source's settings by key: the name as it was spelled there, and the value."""

_LENGTHS = ("training.steps", "training.epochs")
"""Two ways to say how long to train: the nearest source that says one of them decides."""


def _replaced_lengths(given: Collection[str]) -> tuple[str, ...]:
    """The other setting of a run's length where ``given`` has one of the two keys."""
    named = [key for key in _LENGTHS if key in given]
    return tuple(key for key in _LENGTHS if len(named) == 1 and key not in named)


def overlay(flags: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``flags`` by short name with those ``given`` in their place; given epochs replace steps, and steps epochs.

    Raises:
        UnknownSettingError, InvalidSettingError: As `by_short_name`.
    """
    new = by_short_name(given)
    by_key = {key: short_name(key) for key in _LENGTHS}
    replaced = {by_key[key] for key in _replaced_lengths([key for key, short in by_key.items() if short in new])}
    return {name: value for name, value in by_short_name(flags).items() if name not in replaced} | new


def by_short_name(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by any of their names, as settings by short name; None means not given.

    Raises:
        UnknownSettingError: A name that no setting has; the nearest one is named.
        InvalidSettingError: Two names of one setting, with different values.
    """
    return {short_name(key): value for key, (_, value) in _from_flags(flags, all_settings()).items()}


def apply_lora_preset(resolved: Resolved, preset: str) -> Resolved:
    """The settings with rank and layers of a LoRA preset, where they are not set otherwise."""
    values: dict[str, Any] = {}
    sources = dict(resolved.sources)
    _fill_lora(values, sources, preset)
    changes = {key.partition(".")[2]: value for key, value in values.items()}
    changed = replace(resolved.settings, lora=replace(resolved.settings.lora, **changes))
    return Resolved(changed, MappingProxyType(sources))


def with_output(wanted: RunSettings, output: Path) -> RunSettings:
    """Recorded settings, with the output folder where it is now: it may have been moved since."""
    if to_path(wanted.training.output_dir) == output:
        return wanted
    return replace(wanted, training=replace(wanted.training, output_dir=str(output)))


def _fill_lora(values: dict[str, Any], sources: dict[str, Source], preset: str) -> None:
    r, targets = LORA_PRESETS[preset]
    for key, value in (("lora.r", r), ("lora.target_modules", targets)):
        if sources[key] in ("default", "preset"):
            values[key], sources[key] = value, "preset"


def _expand_model(name: str) -> str:
    """A short name of `backprop models` as the Hub id that it stands for."""
    found = find_preset(name)
    return name if found is None else found.model


def from_record(record: RunRecord, overrides: Mapping[str, Any] | None = None) -> Resolved:
    """The settings of a recorded run, so that it can continue or be done again from any folder.

    A relative path that was meant from the run's own working folder is led there. What was taken by default and not
    overridden stays a default, so that a changed method brings its own learning rate.

    Args:
        overrides: By any name of a setting: values that take the record's place, as text or as they are.

    Raises:
        UnknownSettingError: An override names no setting; or the record has one that this version does not know.
        InvalidSettingError: A value cannot be used, or was a secret and is masked in the record.
    """
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(all_settings(), "default")
    for name, raw in (overrides or {}).items():
        setting = find_setting(name)
        values[setting.key] = _convert(setting, raw, "override", name)
        sources[setting.key] = "override"
    replaced = _replaced_lengths(values)
    for key, entry in record.settings.items():
        if key in replaced:
            continue
        setting = find_setting(key)
        follows = (key == "training.learning_rate" and entry["source"] == "default") or (
            entry["source"] == "preset" and "lora.preset" in values
        )
        if key in values or follows:
            continue
        if MASK in str(entry["value"]):
            raise InvalidSettingError(f"{key} holds a secret, which the record of {record.run_id} does not keep")
        values[key] = _convert(setting, anchored(key, entry["value"], record.cwd), "record", setting.short)
        sources[key] = entry["source"] if entry["source"] in ("default", "preset") else "record"
    if sources["lora.preset"] == "override" and values["lora.preset"] in LORA_PRESETS:
        _fill_lora(values, sources, values["lora.preset"])
    return Resolved(_build(values), MappingProxyType(sources))


def anchored(key: str, value: Any, cwd: str) -> Any:
    """A recorded path, led to the folder that the run was started in if it is not there from here."""
    if key not in _PATHS or not value or Path(value).is_absolute():
        return value
    there = Path(cwd) / value
    return str(there) if Path(cwd) != Path.cwd() and path_exists(there) else value


def _from_flags(flags: Mapping[str, Any], known: Mapping[str, Setting]) -> _Layer:
    names = run_names() if known is all_settings() else ui_names()
    named: list[tuple[str, str, Any]] = []
    for name, value in flags.items():
        if value is None:
            continue
        if name not in names:
            raise UnknownSettingError(f"there is no setting {name!r}{nearest(name, names)}")
        named.append((name, names[name].key, value))
    return _join_names(named)


def _join_names(named: Iterable[tuple[str, str, Any]]) -> _Layer:
    """A source's settings, from triples of a name as it was spelled, its key and the value.

    Raises:
        InvalidSettingError: Two names of one setting, with different values.
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, key, value in named:
        other, before = found.setdefault(key, (name, value))
        if before is not value and str(before) != str(value):  # a path may be given as text too
            raise InvalidSettingError(
                f"{other} and {name} are two names of {key}, with different values: {before!r} and {value!r}",
                fix=f"Set one of them: {other}, or {name}.",
            )
    return found


def _from_env(environ: Mapping[str, str]) -> _Layer:
    by_env = {s.env: s.key for s in (*all_settings().values(), *ui_settings().values())}
    named: list[tuple[str, str, str]] = []
    for name, value in environ.items():
        own = name.removeprefix(ENV_PREFIX)
        if own == name or own in PROGRAM_ENV:
            continue
        spelled = _from_variable(name)
        setting = run_names().get(spelled) or (ui_names().get(spelled) if "." in spelled else None)
        if setting is not None:
            if name == setting.env or setting.env not in environ:  # a variable's own name wins over its others
                named.append((name, setting.key, value))
        elif old := legacy_names.find_variable(own):
            raise OldNameError(f"the environment variable {name} was removed", cause=old.why, fix=old.now)
        else:
            raise UnknownSettingError(f"the environment variable {name} is no setting{nearest(name, by_env)}")
    return _join_names(named)


def _from_toml(file: Path | None) -> _Layer:
    if file is None or not file.is_file():
        return {}
    import tomllib  # only where there is a file: commands start without it

    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsFileError(f"{file} cannot be read as TOML", cause=str(error)) from error
    names = {**ui_names(), **run_names()}
    named: list[tuple[str, str, Any]] = []
    for group, table in tree.items():
        for name, value in table.items() if isinstance(table, dict) else [("", table)]:
            spelled = f"{group}.{name}".rstrip(".")
            if spelled not in names:
                raise UnknownSettingError(f"{file} sets {spelled!r}, which is no setting{nearest(spelled, names)}")
            named.append((f"{spelled} in {file.name}", names[spelled].key, value))
    return _join_names(named)


def _convert(setting: Setting, raw: Any, source: Source, name: str) -> Any:
    """``raw`` as the setting's type; text from the environment is read as the type wants it.

    Raises:
        InvalidSettingError: It can't be; ``name`` is the setting's as it was spelled.
    """
    if isinstance(raw, str) and "tuple" in str(setting.type):
        apart = "[|,]" if choices(setting) else "[|]"  # texts may hold commas, words of a list do not
        raw = [part.strip() for part in re.split(apart, raw) if part.strip()]
    if isinstance(raw, Mapping) and "tuple" in str(setting.type):
        raw = [f"{theirs}={ours}" for theirs, ours in raw.items()]
    if isinstance(raw, Path):
        raw = str(raw)
    where = name if source in ("env", "toml") else f"{{set:{name.replace('-', '_')}}}"
    is_word = choices(setting) and "tuple" not in str(setting.type)
    if choices(setting) and isinstance(raw, list):
        raw = tuple(map(str, raw))
    value = (
        raw if is_word or isinstance(raw, tuple) or type(raw) is setting.type else _as_type(setting, raw, source, where)
    )
    check_value(setting.key, value, setting.type, setting.range, where)
    return value


def _as_type(setting: Setting, raw: Any, source: Source, where: str) -> Any:
    import msgspec  # only where something must be read: commands start without it

    try:
        return msgspec.convert(raw, setting.type, strict=source == "toml")
    except msgspec.ValidationError as error:
        raise InvalidSettingError(
            f"invalid value for {where}: {raw!r}", cause=f"it must be {kind_of(setting)}", setting=setting.key
        ) from error


def kind_of(setting: Setting) -> str:
    """What a setting takes, in words: ``a whole number``."""
    named = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "texts", "str": "text"}
    return next((words for kind, words in named.items() if kind in str(setting.type)), "text")


def _build(values: Mapping[str, Any]) -> RunSettings:
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, name = key.split(".")
        groups.setdefault(group, {})[name] = value
    types = get_type_hints(RunSettings)
    return RunSettings(**{group: types[group](**values) for group, values in groups.items()})
