"""Every name of the older tool (its README, version 1.8.5) works, or answers with what stands in its place."""

from typing import get_args

import pytest

from backpropagate import legacy_names
from backpropagate.cli.app import COMMANDS, GROUPS, build_app, run
from backpropagate.cli.errors import load_codes
from backpropagate.cli.global_flags import SWITCHES
from backpropagate.errors import OldNameError
from backpropagate.legacy_codes import LEGACY_CODES
from backpropagate.settings import ENV_PREFIX, PROGRAM_ENV, all_settings, resolve, resolve_ui, run_names, ui_settings

SHARED = """--model -m --data -d --steps --samples --batch-size --lr --lora-preset --lora-r --lora-alpha --lora-dropout
--target-modules --init-lora-weights --use-dora --no-4bit --no-packing --no-gradient-checkpointing --optim --method
--orpo-beta --simpo-beta --simpo-gamma --kto-beta --kto-desirable-weight --kto-undesirable-weight --report-to
--run-name --gpu-max-temp --output -o"""
OLD_FLAGS = {
    "train": SHARED + """ --use-rslora --mode --full-ft-ceiling-billions --full-ft-offload --full-ft-engine
        --switch-block-every --block-order --block-writeback --block-freeze-embeddings --fp8 --reasoning-trace --backend
        --no-unsloth --resume --ui-run-dir""",
    "multi-run": SHARED + """ --runs --merge-mode --merge-strategy --ties-trim --dare-drop-rate --dare-seed --drift-gate
        --drift-threshold --eval-gate --eval-max-regression --eval-heldout""",
    "export": """--format -f --quantization -q --output -o --ollama --ollama-name --base-model --adapter-tag
        --no-model-card --push-to-hub --hub-token --hub-token-file --hub-private""",
    "resume": "--output --data",
    "replay": "--output --override --json",
    "runs": "--output --status --limit --json",
    "list-runs": "--output --status --limit --json",
    "show-run": "--output --json",
    "diff-runs": "--output --format",
    "export-runs": "--output --format --to --status",
    "eval": """--vs --gate-against --output --heldout --prompts -n --max-new-tokens --max-regression --seed --metric
        --references --eval-set --gate-metric --allow-code-exec --code-exec-timeout --json""",
    "generate": "",
    "data report": """--format --against --max-samples --dup-threshold --fail-on-dups --fail-on-contamination
        --max-outlier-rate --strict --json""",
    "data split": "--heldout-ratio --seed --out-train --out-heldout",
    "validate": "--format --max-errors --max-samples --json",
    "estimate-vram": """--vram-gb --lora-r --batch-size --mode --full-ft-offload --no-4bit --target-modules
        --no-gradient-checkpointing --calibrate --no-calibration --json""",
    "push": "--repo --token --token-file --private --include-base --hub-revision --hub-commit-message",
    "ollama register": "--name --modelfile",
    "ollama list": "",
    "ollama rm": "",
    "ollama shelf": "",
    "info": "--json --error-codes --env-vars --subcommand-tiers",
    "config": "--show --set --reset",
    "ui": "",
}  # fmt: skip
EVERYWHERE = "--verbose -v --log-level --log-format --log-file"
OLD_ENV = """MODEL__NAME MODEL__MAX_SEQ_LENGTH MODEL__TRUST_REMOTE_CODE MODEL__LOAD_IN_4BIT MODEL__DTYPE LORA__R LORA__LORA_ALPHA
LORA__LORA_DROPOUT LORA__TARGET_MODULES LORA__USE_GRADIENT_CHECKPOINTING LORA__RANDOM_STATE LORA__USE_DORA
LORA__USE_RSLORA LORA__INIT_LORA_WEIGHTS TRAINING__METHOD TRAINING__BACKEND TRAINING__LEARNING_RATE TRAINING__MAX_STEPS
TRAINING__PER_DEVICE_TRAIN_BATCH_SIZE TRAINING__GRADIENT_ACCUMULATION_STEPS TRAINING__WARMUP_STEPS
TRAINING__LR_SCHEDULER_TYPE TRAINING__WEIGHT_DECAY TRAINING__OPTIM TRAINING__LOGGING_STEPS TRAINING__SAVE_STEPS
TRAINING__SEED TRAINING__BF16 TRAINING__FP16 TRAINING__FP8 TRAINING__OUTPUT_DIR TRAINING__ORPO_BETA TRAINING__SIMPO_BETA
TRAINING__SIMPO_GAMMA TRAINING__KTO_BETA TRAINING__KTO_DESIRABLE_WEIGHT TRAINING__KTO_UNDESIRABLE_WEIGHT
TRAINING__NUM_TRAIN_EPOCHS TRAINING__WARMUP_RATIO TRAINING__OVERWRITE_OUTPUT_DIR DATA__DATASET_NAME DATA__DATASET_SPLIT
DATA__MAX_SAMPLES DATA__TEXT_COLUMN DATA__PACKING DATA__SHUFFLE DATA__REASONING_TRACE DATA__MIN_TRACE_TOKENS
DATA__MAX_TRACE_TOKENS DATA__CHAT_FORMAT DATA__PRE_TOKENIZE MULTIRUN__NUM_RUNS MULTIRUN__STEPS_PER_RUN
MULTIRUN__SAMPLES_PER_RUN MULTIRUN__CONTINUE_FROM_PREVIOUS MULTIRUN__SAVE_INTERMEDIATE MULTI_RUN__NUM_RUNS
WINDOWS__PRE_TOKENIZE WINDOWS__XFORMERS_DISABLED WINDOWS__DATALOADER_NUM_WORKERS WINDOWS__CUDA_LAUNCH_BLOCKING
WINDOWS__TOKENIZERS_PARALLELISM UI__OUTPUT_DIR UI__PORT UI__HOST UI__SHARE UI__AUTO_OPEN SECURITY__REQUIRE_AUTH
SECURITY__AUTH_USERNAME SECURITY__AUTH_PASSWORD SECURITY__ALLOWED_PATHS SECURITY__BLOCK_PATH_TRAVERSAL
SECURITY__SESSION_TIMEOUT_MINUTES SECURITY__JWT_SECRET SECURITY__JWT_ALGORITHM SECURITY__ENABLE_CSRF
SECURITY__CSRF_TOKEN_EXPIRY_MINUTES SECURITY__RATE_LIMIT_TRAINING SECURITY__RATE_LIMIT_EXPORT SECURITY__AUDIT_LOG_ENABLED
SECURITY__AUDIT_LOG_FILE SECURITY__ENABLE_CSP SECURITY__CSP_REPORT_ONLY SECURITY__MAX_UPLOAD_SIZE_MB
SECURITY__VALIDATE_FILE_MAGIC LOG_LEVEL LOG_JSON LOG_FILE DEBUG LLAMA_CPP_PATH UNSLOTH_AUTO_INSTALL OFFLOAD_PIN
OFFLOAD_ROUNDING VRAM_CALIBRATION QUIET_TOKEN_HINT DEFER_FEATURE_DETECTION DEFER_FEATURE_QUIET CLOUDFLARED_TIMEOUT
ALLOW_CODE_EVAL UI_QUIET UI_WORKDIR UI_PAYLOAD_DIR UI_REQUEST_LOG UI_CORS_EXTRA_ORIGINS UI_RATE_LIMIT_HTTP_PER_MIN
UI_RATE_LIMIT_WS_PER_MIN UI_RATE_LIMIT_UPLOAD_PER_MIN UI_AUTH UI_AUTH_USER UI_AUTH_VERIFIER UI_LAUNCH_TOKEN UI_HOST_BIND
UI_SHARE_HOST UI_PORT"""

THERE = [*(c.name for c in COMMANDS), *GROUPS]


def _other_value(setting) -> str:
    """A value that the setting takes, as str() prints it in lower case."""
    kind = str(setting.type)
    if (choices := get_args(setting.type)) and all(isinstance(choice, str) for choice in choices):
        return choices[-1]
    return {"bool": "true", "int": "9", "float": "0.5"}.get(
        getattr(setting.type, "__name__", ""), "9.0" if "float" in kind else "9" if "int" in kind else "x"
    )


def flags_of(command: str) -> set[str]:
    app = build_app()
    for word in command.split():
        app = app[word]
    collection = app.assemble_argument_collection(parse_docstring=False) if command not in GROUPS else ()
    return {name for argument in collection for name in argument.names} | {s.flag for s in SWITCHES} | {"-v"}


@pytest.mark.parametrize("command", OLD_FLAGS)
def test_an_old_command_is_there_or_names_its_successor(command, capsys):
    if command not in THERE:
        assert run(command.split()) == 1
        assert capsys.readouterr().err.startswith("[INPUT_OLD_NAME]: ")


@pytest.mark.parametrize("command", [c for c in OLD_FLAGS if c in THERE])
def test_an_old_flag_works_or_names_its_successor(command, capsys):
    known = flags_of(command)
    for flag in OLD_FLAGS[command].split() + EVERYWHERE.split():
        if flag in known:
            continue
        if command in GROUPS and flag == "--json":
            continue  # its refusal is a JSON document then
        old = legacy_names.find_flag(command, flag)
        assert old is not None, f"{command} {flag}"
        run([*command.split(), flag, "x"])
        error = capsys.readouterr().err
        assert error.startswith(f"[INPUT_OLD_NAME]: backprop {command} has no {flag} any more")
        assert old.now in error


@pytest.mark.parametrize("name", OLD_ENV.split())
def test_an_old_variable_works_or_names_its_successor(name, monkeypatch):
    variable = ENV_PREFIX + name
    if name in PROGRAM_ENV:
        return
    if (setting := run_names().get(name.replace("__", ".").lower())) is not None:
        key = setting.key
        value = _other_value(all_settings()[key])
        found = resolve({}, {variable: value})
        assert found.sources[key] == "env"
        assert str(found.settings.to_flat()[key]).lower() == value
        return
    if key := {s.env: s.key for s in ui_settings().values()}.get(variable):
        assert resolve_ui({}, {variable: "1"})[1][key] == "env"
        return
    with pytest.raises(OldNameError) as caught:
        resolve({}, {variable: "1"})
    assert variable in caught.value.message
    assert caught.value.fix != OldNameError.default_fix


def test_the_new_name_of_a_variable_wins_over_the_old_one():
    both = {"BACKPROPAGATE_TRAINING__MAX_STEPS": "5", "BACKPROPAGATE_TRAINING__STEPS": "7"}
    for environ in (both, dict(reversed(both.items()))):
        assert resolve({}, environ).settings.training.steps == 7


def test_the_table_names_only_old_things():
    for command, flags in legacy_names.FLAGS.items():
        assert command in OLD_FLAGS
        assert set(flags) <= set(OLD_FLAGS[command].split())


OLD_CODES = [
    "INPUT_VALIDATION_FAILED",
    "INPUT_AUTH_REQUIRED",
    "INPUT_AUTH_INVALID_SHAPE",
    "INPUT_PATH_TRAVERSAL",
    "INPUT_DATASET_INVALID",
    "INPUT_DATASET_NOT_FOUND",
    "INPUT_DATASET_PARSE_FAILED",
    "INPUT_DATASET_VALIDATION_FAILED",
    "INPUT_DATASET_FORMAT_UNSUPPORTED",
    "INPUT_DATASET_REPORT_THRESHOLD",
    "INPUT_EVAL_RUN_NOT_FOUND",
    "INPUT_EVAL_HELDOUT_UNRESOLVED",
    "INPUT_RESUME_NOT_FOUND",
    "INPUT_UNSAFE_CHAT_TEMPLATE",
    "CONFIG_INVALID",
    "CONFIG_INVALID_SETTING",
    "CONFIG_TRUST_REMOTE_CODE_REQUIRED",
    "DEP_MODEL_LOAD_FAILED",
    "DEP_DATASET_ENGINE_MISSING",
    "DEP_OLLAMA_REGISTRATION_FAILED",
    "DEP_GPU_NOT_AVAILABLE",
    "DEP_MLX_UNAVAILABLE",
    "DEP_FSDP_UNAVAILABLE",
    "RUNTIME_TRAINING_FAILED",
    "RUNTIME_TRAINING_ABORTED",
    "RUNTIME_EVAL_FAILED",
    "RUNTIME_EVAL_GATE_REGRESSED",
    "RUNTIME_VRAM_CALIBRATION_FAILED",
    "RUNTIME_UI_AUTH_NOT_ENFORCED",
    "RUNTIME_UI_PORT_IN_USE",
    "RUNTIME_UI_WORKDIR_UNAVAILABLE",
    "UI_OUTPUT_DIR_FORBIDDEN",
    "STATE_CHECKPOINT_INVALID",
    "PEFT_API_INCOMPATIBLE",
    "RUNTIME_EXPORT_FAILED",
    "RUNTIME_LORA_EXPORT_FAILED",
    "RUNTIME_GGUF_EXPORT_FAILED",
    "RUNTIME_MERGE_EXPORT_FAILED",
    "HUB_PUSH_INVALID_REPO",
    "HUB_PUSH_NOT_FOUND",
    "HUB_PUSH_NETWORK",
    "HUB_PUSH_UNKNOWN",
    "RUNTIME_GPU_ERROR",
    "RUNTIME_GPU_OOM",
    "RUNTIME_OOM_RECOVERY_EXHAUSTED",
    "RUNTIME_OOM_ADJACENT",
    "RUNTIME_FULL_FT_MODEL_TOO_LARGE",
    "RUNTIME_FP8_UNSUPPORTED",
    "RUNTIME_GPU_TEMPERATURE_CRITICAL",
    "RUNTIME_GPU_MONITORING_FAILED",
    "RUNTIME_SLAO_ERROR",
    "RUNTIME_SLAO_MERGE_FAILED",
    "SLAO_MERGE_DIVERGED",
    "STATE_SLAO_CHECKPOINT_INVALID",
    "PARTIAL_BATCH_OPERATION",
    "PARTIAL_SUCCESS",
]


def test_every_old_code_is_explained(capsys):
    known = load_codes()
    assert len(OLD_CODES) == 56
    for code in OLD_CODES:
        assert run(["errors", f"[{code.lower()}]:"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{code}  (exit ")
        assert len(said.splitlines()) == (3 if code in known else 4)
        assert "{" not in said
    assert set(LEGACY_CODES) == set(OLD_CODES) - set(known), "a code is either alive or explained"
    assert {name for old in LEGACY_CODES.values() for name in old.replaced_by} <= set(known)


def test_an_unknown_code_is_answered_with_the_nearest_one(capsys):
    assert run(["errors", "RUNTIME_GGUF_EXPORT_FAIL"]) == 1
    assert "did you mean 'RUNTIME_GGUF_EXPORT_FAILED'?" in capsys.readouterr().err
