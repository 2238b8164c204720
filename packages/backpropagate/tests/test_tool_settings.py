import json

import pytest

from backpropagate.cli.app import build_app, run
from backpropagate.continual.spec import MultiRunSpec, RunSettings
from backpropagate.errors import SettingsFileError, UnknownSettingError
from backpropagate.settings import (
    ENV_PREFIX,
    all_settings,
    by_short_name,
    find_setting,
    from_record,
    overlay,
    resolve,
    ui_settings,
)
from bp_runs.errors import InvalidSettingError
from bp_runs.record import RunRecord

OTHERS = {
    "model.name": "x/y",
    "model.revision": "main",
    "model.max_seq_length": 512,
    "model.dtype": "bfloat16",
    "model.trust_remote_code": True,
    "data.path": "d.jsonl",
    "data.subset": "en",
    "data.split": "test",
    "data.revision": "v1",
    "data.samples": 3,
    "data.on_bad_row": "skip",
    "data.columns": ("a=question",),
    "data.ignore_columns": ("notes",),
    "data.encoding": "cp1252",
    "data.control_tokens": "allow",
    "data.on_overflow": "split",
    "data.min_tokens": 5,
    "data.dedup": "near",
    "data.reasoning_trace": True,
    "data.trace_min_tokens": 4,
    "data.trace_max_tokens": 100,
    "lora.preset": "auto",
    "lora.r": 7,
    "lora.alpha": 9.0,
    "lora.dropout": 0.5,
    "lora.init_lora_weights": "pissa",
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.target_modules": "q_proj",
    "training.backend": "cuda",
    "training.method": "dpo",
    "training.mode": "qlora",
    "training.engine": "unsloth",
    "training.steps": 3,
    "training.epochs": 1.5,
    "training.optim": "adamw_8bit",
    "training.deterministic": True,
    "training.report_to": ("tensorboard",),
    "training.run_name": "mine",
    "training.start_from": "9f2c1a@50",
    "training.fp8": True,
    "training.learning_rate": 0.5,
    "training.batch_size": 7,
    "training.gradient_accumulation": 9,
    "training.warmup_steps": 1,
    "training.scheduler": "cosine",
    "training.weight_decay": 0.25,
    "training.max_grad_norm": 0.5,
    "training.gradient_checkpointing": False,
    "training.packing": True,
    "training.curriculum": "length",
    "training.eval_share": 0.25,
    "training.eval_min_rows": 3,
    "training.eval_steps": 7,
    "training.early_stop": 1,
    "training.keep": "last",
    "training.oom_recovery": False,
    "training.save_steps": 7,
    "training.save_minutes": 2.5,
    "training.keep_checkpoints": 5,
    "training.resume": False,
    "training.preflight": "on",
    "training.gpu_max_temp": 80,
    "training.kernels": "none",
    "training.output_dir": "elsewhere",
    "training.seed": 1,
    "training.sample_prompts": ("a", "b"),
    "training.sample_tokens": 5,
    "training.dpo_beta": 0.5,
    "training.orpo_beta": 0.5,
    "training.simpo_beta": 2.5,
    "training.simpo_gamma": 0.5,
    "training.kto_beta": 0.5,
    "training.kto_desirable_weight": 2.0,
    "training.kto_undesirable_weight": 2.0,
    "multirun.runs": 3,
    "multirun.merge": "none",
    "multirun.last_lr": 1.0,
    "multirun.replay_share": 0.25,
    "multirun.replay": "recent",
    "multirun.heldout": 0.5,
    "multirun.metric": "f1",
    "multirun.eval_gate": True,
    "multirun.max_regression": 0.5,
    "multirun.patience": 2,
    "multirun.keep_adapters": "last",
}


def as_text(value) -> str:
    return "|".join(value) if isinstance(value, tuple) else str(value)


def spell_toml(value) -> str:
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)


def record_of(recorded) -> RunRecord:
    return RunRecord(run_id="r", kind="train", status="completed", settings=recorded, cwd="/")


def test_every_setting_is_in_this_file():
    assert set(OTHERS) == set(all_settings())
    assert all(OTHERS[k] != s.default for k, s in all_settings().items())
    assert all(s.help.endswith(".") and len(s.help) > 10 for s in all_settings().values())


@pytest.mark.parametrize("key", OTHERS)
def test_each_source_reaches_each_setting_and_the_nearer_wins(key, tmp_path):
    setting, value = all_settings()[key], OTHERS[key]
    group, name = key.split(".")
    toml = tmp_path / "backpropagate.toml"
    toml.write_text(f"[{group}]\n{name} = {spell_toml(value)}\n")
    for found, source in (
        (resolve({}, {}, toml), "toml"),
        (resolve({}, {setting.env: as_text(value)}, None), "env"),
        (
            resolve({setting.short: value}, {setting.env: as_text(setting.default)} if setting.default else {}, toml),
            "flag",
        ),
    ):
        assert found.settings.to_flat()[key] == value
        assert found.sources[key] == source
        assert [k for k, s in found.sources.items() if s != "default"] == [key]
    assert resolve({}, {setting.env: as_text(value)}, toml).sources[key] == "env"


def test_the_nearest_source_that_says_how_long_to_train_decides(tmp_path):
    toml = tmp_path / "backpropagate.toml"
    toml.write_text("[training]\nsteps = 100\n")
    found = resolve({"epochs": 2.0}, {}, toml)
    assert (found.settings.training.steps, found.settings.training.epochs) == (None, 2.0)
    assert (found.sources["training.steps"], found.sources["training.epochs"]) == ("default", "flag")
    found = resolve({"steps": 5}, {"BACKPROPAGATE_TRAINING__EPOCHS": "3"}, toml)
    assert (found.settings.training.steps, found.settings.training.epochs) == (5, None)
    assert overlay({"steps": 7, "lr": 1e-4}, {"epochs": 2}) == {"lr": 1e-4, "epochs": 2}
    assert overlay({"max_steps": 7}, {"epochs": None}) == {"steps": 7}
    for together in ({"steps": 3, "epochs": 2.0}, {"epochs": 0.0}):
        with pytest.raises(InvalidSettingError):
            resolve(together, {}, None)


NAMES = [(key, name) for key, found in all_settings().items() for name in (*found.words, *found.dotted)]


def test_no_two_settings_share_a_name():
    for settings in (all_settings(), ui_settings()):
        named = [name for found in settings.values() for name in (*found.words, *found.dotted)]
        assert len(named) == len(set(named))


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_every_name_of_a_setting_is_known_to_every_parser(key, name, tmp_path):
    setting, value = all_settings()[key], OTHERS[key]
    group, _, word = name.rpartition(".")
    toml = tmp_path / "backpropagate.toml"
    toml.write_text(f"{f'[{group}]' if group else ''}\n{word} = {spell_toml(value)}\n")
    variable = ENV_PREFIX + name.replace(".", "__").upper()
    found = {
        "keyword": resolve({name: value}),
        "variable": resolve({}, {variable: as_text(value)}),
        "toml": resolve({}, {}, toml),
        "override": from_record(record_of({}), {name: as_text(value)}),
    }
    assert {source: resolved.settings.to_flat()[key] for source, resolved in found.items()} == dict.fromkeys(
        found, value
    )
    assert by_short_name({name: value}) == {setting.short: value}
    for spelled in (name, variable, name.upper(), name.replace("_", "-"), "--" + name.replace("_", "-")):
        assert find_setting(spelled).key == key


@pytest.mark.parametrize("command", ["train", "multi-run"])
def test_every_name_of_a_setting_is_a_flag(command):
    app = build_app()[command]
    flags = {name for argument in app.assemble_argument_collection(parse_docstring=False) for name in argument.names}
    wanted = {
        "--" + word.replace("_", "-")
        for found in all_settings().values()
        if command == "multi-run" or not found.key.startswith("multirun.")
        for word in found.words
    }
    assert wanted <= flags


def test_a_flag_by_any_name_reaches_its_setting():
    bind = build_app().parse_args
    for flag, short in (("--learning-rate", "lr"), ("--max-steps", "steps"), ("--from", "start_from")):
        assert bind(["train", flag, "3"], exit_on_error=False)[1].kwargs[short] in (3, "3")
    for words in (["d.jsonl"], ["--data", "d.jsonl"], ["--dataset", "d.jsonl"]):
        assert bind(["validate", *words], exit_on_error=False)[1].arguments["data"] == "d.jsonl"
    for flag in ("--batch-size", "--per-device-train-batch-size"):
        assert bind(["estimate-vram", flag, "3"], exit_on_error=False)[1].kwargs["batch_size"] == 3


@pytest.mark.parametrize(
    ("flags", "environ", "toml"),
    [
        ({"lr": 1e-3, "learning_rate": 1e-4}, {}, ""),
        ({}, {"BACKPROPAGATE_LR": "1e-3", "BACKPROPAGATE_TRAINING__LR": "1e-4"}, ""),
        ({}, {}, "[training]\nlr = 1e-3\nlearning_rate = 1e-4\n"),
    ],
)
def test_two_names_of_one_setting_must_agree(flags, environ, toml, tmp_path):
    file = tmp_path / "b.toml"
    file.write_text(toml)
    with pytest.raises(InvalidSettingError, match=r"two names of training\.learning_rate") as caught:
        resolve(flags, environ, file)
    assert "Set one of them" in caught.value.fix
    same = dict.fromkeys(flags, 1e-4)
    assert resolve(same).settings.training.learning_rate == (1e-4 if same else None)


def test_defaults_are_bp_runs_own():
    assert resolve({}).settings == RunSettings()


@pytest.mark.parametrize(
    ("flags", "rate", "source"),
    [
        ({}, 2e-4, "default"),
        ({"method": "dpo"}, 5e-6, "default"),
        ({"method": "orpo"}, 8e-6, "default"),
        ({"method": "orpo", "lr": 1e-3}, 1e-3, "flag"),
        ({"mode": "full"}, 2e-5, "default"),
        ({"method": "dpo", "mode": "full"}, 5e-7, "default"),
    ],
)
def test_the_record_shows_the_method_s_own_learning_rate_unless_one_is_named(flags, rate, source):
    assert resolve(flags).to_record()["training.learning_rate"] == {"value": rate, "source": source}


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "near"),
    [
        ({"lora_rank": 3}, {}, "", "lora_r"),
        ({}, {"BACKPROPAGATE_LORA__RANK": "3"}, "", "BACKPROPAGATE_LORA__R"),
        ({}, {"BACKPROPAGATE_HOEM": "3"}, "", None),
        ({}, {}, "[training]\nstep = 3\n", "training.steps"),
        ({}, {}, "stepz = 3\n", "steps"),
        ({}, {}, "[nothing]\nx = 3\n", None),
    ],
)
def test_unknown_names_are_errors_that_name_the_nearest(flags, environ, toml, near, tmp_path):
    file = tmp_path / "b.toml"
    file.write_text(toml)
    with pytest.raises(UnknownSettingError) as caught:
        resolve(flags, environ, file)
    if near:
        assert f"did you mean {near!r}" in caught.value.message


@pytest.mark.parametrize(
    ("flags", "environ", "toml"),
    [
        ({}, {"BACKPROPAGATE_LORA__R": "many"}, ""),
        ({}, {"BACKPROPAGATE_MODEL__DTYPE": "int3"}, ""),
        ({}, {}, "[lora]\nr = '16'\n"),
        ({"lora_r": 0}, {}, ""),
        ({"lora_dropout": 1.0}, {}, ""),
        ({"lr": 0.0}, {}, ""),
        ({"lr": float("nan")}, {}, ""),
        ({"weight_decay": float("nan")}, {}, ""),
        ({"steps": -1}, {}, ""),
        ({"lora_alpha": -1.0}, {}, ""),
    ],
)
def test_values_that_a_setting_cannot_take(flags, environ, toml, tmp_path):
    file = tmp_path / "b.toml"
    file.write_text(toml)
    with pytest.raises(InvalidSettingError):
        resolve(flags, environ, file)


def test_a_broken_settings_file_is_named(tmp_path):
    file = tmp_path / "backpropagate.toml"
    file.write_text("[lora\n")
    with pytest.raises(SettingsFileError, match=r"backpropagate\.toml"):
        resolve({}, {}, file)


def test_the_programs_own_variables_are_no_settings():
    names = ("HOME", "LOG_LEVEL", "LOG_FORMAT", "OFFLINE", "DEBUG", "RANKS_TOKEN")
    assert resolve({}, {f"BACKPROPAGATE_{n}": "1" for n in names}).settings == RunSettings()


def test_reasoning_traces_get_room_unless_the_user_says_otherwise():
    assert resolve({"reasoning_trace": True}).settings.model.max_seq_length == 8192
    assert resolve({"reasoning_trace": True, "max_seq_length": 512}).settings.model.max_seq_length == 512


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a settings file, and a variable set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backpropagate.toml").write_text("[training]\nseed = 7\n")
    monkeypatch.setenv("BACKPROPAGATE_LORA__R", "4")
    return tmp_path


def test_config_show_tells_each_value_and_its_source(here, capsys):
    assert run(["config", "show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(here / "backpropagate.toml")
    rows = {row["key"]: row for row in found["settings"]}
    assert list(rows) == [*all_settings(), *ui_settings()]
    assert (rows["lora.r"]["value"], rows["lora.r"]["source"]) == (4, "env")
    assert (rows["training.seed"]["value"], rows["training.seed"]["source"]) == (7, "toml")
    assert rows["model.dtype"]["choices"] == ["auto", "float32", "bfloat16"]
    assert run(["config", "show", "--changed"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[:2]] == [["lora.r", "4", "(env)"], ["training.seed", "7", "(toml)"]]
    assert shown[2] == ""
    assert run(["config"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 3


@pytest.mark.parametrize("name", ["lora.r", "--lora-r", "lora_r", "BACKPROPAGATE_LORA__R", "Lora.R"])
def test_config_explain_takes_every_spelling(name, here, capsys):
    assert run(["config", "explain", name]) == 0
    text = capsys.readouterr().out
    for part in (
        "lora.r: Rank",
        "4  (from: env)",
        "a whole number",
        "--lora-r",
        "BACKPROPAGATE_LORA__R",
        "[lora] r = 4",
    ):
        assert part in text


@pytest.mark.parametrize("key", OTHERS)
def test_what_config_explain_says_to_write_can_be_read(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["config", "explain", key]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  file "))
    group, rest = line.partition("toml: ")[2].split("] ")
    if "…" not in rest:
        (tmp_path / "backpropagate.toml").write_text(f"{group}]\n{rest}\n")
        assert resolve({}, {}, tmp_path / "backpropagate.toml").sources[key] == "toml"


def test_config_explain_of_an_unknown_key_names_the_nearest(here, capsys):
    assert run(["config", "explain", "lora.rank"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("[CONFIG_UNKNOWN_SETTING]: there is no setting 'lora.rank'; did you mean 'lora.r'?")
    assert "backprop config show" in error


@pytest.mark.parametrize(
    ("environ", "toml", "named"),
    [
        ({"BACKPROPAGATE_TRAINING__MAX_STEPS": "x"}, "", "BACKPROPAGATE_TRAINING__MAX_STEPS"),
        ({}, "[training]\nmax_steps = 'x'\n", "training.max_steps in backpropagate.toml"),
    ],
)
def test_a_wrong_value_is_reported_under_the_name_that_was_written(environ, toml, named, tmp_path):
    file = tmp_path / "backpropagate.toml"
    file.write_text(toml)
    with pytest.raises(InvalidSettingError) as caught:
        resolve({}, environ, file)
    assert caught.value.message == f"invalid value for {named}: 'x'"


def test_settings_of_multi_runs_are_held_to_their_ranges_too():
    with pytest.raises(InvalidSettingError, match=r"runs is 0; it must be at least 1"):
        RunSettings(multirun=MultiRunSpec(runs=0))
    with pytest.raises(InvalidSettingError, match=r"did you mean 'slao'"):
        RunSettings(multirun=MultiRunSpec(merge="slaos"))
