"""Pushing to a Hub that speaks the real protocol: what goes there, what the card says, and every refusal."""

import io
import json
import socket
import ssl
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("PIL")

import numpy as np
from export_pico import export_adapter, write_base, write_json, write_lora
from fake_hub import TOKEN, serve_hub

from bp_export.cli.app import main
from bp_export.errors import (
    PushDeniedError,
    PushNetworkError,
    PushRefusedError,
    PushRepoInvalidError,
    PushRepoTakenError,
    PushSourceError,
)
from bp_export.hub import prepare_push, push
from bp_export.hub.commands import write_train_command
from bp_export.hub.run_record import find_origin
from bp_merge import write_tensors
from bp_runs.adapter import changed_files, read_adapter_folder, read_manifest, write_manifest
from bp_runs.events import DataReady, ModelLoaded, RowCounts, StepDone
from bp_runs.rail import TrainOutcome
from bp_runs.spec import Settings
from bp_runs.store import RunStore
from bp_runs.witness import WITNESS_FILE

# The Hub's library about its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "hf_" + "Q" * 34


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants as constants

    # The library prefers a protocol of its own storage; this switch of its own makes it speak LFS.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def trained(tmp_path):
    """An output folder with a run, its adapter and an export, as training leaves them."""
    base = write_base(tmp_path / "pico-base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    output = tmp_path / "output"
    writer = RunStore(output).start(
        settings=record_settings(base, tmp_path), rail="fake", versions={"peft": "0.21"}, hardware={}
    )
    with writer:
        writer.emit(
            ModelLoaded(
                name=str(base),
                revision=None,
                config_sha256="c" * 64,
                parameters=1000,
                trainable=10,
                mode="lora",
                dtype="float32",
                device="cpu",
            )
        )
        writer.emit(
            DataReady(
                path=str(tmp_path / "private" / "rows.jsonl"),
                sha256="d" * 64,
                template="tokenizer",
                template_sha256="e" * 64,
                read=9,
                whole=8,
                truncated=0,
                dropped=1,
                tokens=900,
                trained_tokens=300,
            )
        )
        for step in range(1, 9):
            writer.emit(
                StepDone(
                    step=step,
                    steps=8,
                    loss=4.0 / step,
                    learning_rate=1e-3,
                    grad_norm=1.0,
                    tokens=step,
                    tokens_per_second=1.0,
                    memory_bytes=1,
                )
            )
        lora = write_lora(writer.folders.adapter, base)
        write_manifest(lora, run_id=writer.run_id, base=str(base))
        rows = RowCounts(read=9, visited=5, truncated=0, not_reached=1, held_out=2, dropped=1, passes=5 / 6)
        outcome = TrainOutcome(
            adapter=lora, steps=8, first_loss=4.0, final_loss=0.5, tokens=900, seconds=1.0, peak_memory=1, rows=rows
        )
        writer.finish(outcome)
    store = RunStore(output)
    adapter = store.publish_adapter(writer.run_id)
    made = export_adapter(adapter, quantization="q8_0", output=output / "model.gguf")
    parity = {
        "reference": "independent forward pass",
        "summary": "passed: 1 checks passed, 0 failed, 1 not tested (stop)",
        "checks": [
            {"name": "greedy", "result": "passed", "note": "40 clear places of 72"},
            {"name": "stop", "result": "not tested", "note": "no turn ends"},
        ],
    }
    store.add_artifact(
        writer.run_id, {"kind": "gguf", "path": str(made.path), "quantization": "q8_0", "parity": parity}
    )
    return {"base": base, "adapter": adapter, "gguf": made.path, "run_id": writer.run_id}


def record_settings(base, folder):
    given = {
        "model.name": str(base),
        "data.path": str(folder / "private" / "rows.jsonl"),
        "lora.r": 8,
        "training.steps": 8,
        "training.gradient_checkpointing": False,
        "training.sample_prompts": ["hello there"],
    }
    return {
        k: {"value": given.get(k, v), "source": "flag" if k in given else "default"}
        for k, v in Settings().to_flat().items()
    }


def test_the_witness_stays_here(hub, trained):
    """It holds examples of the user's data; what is pushed is whole without it."""
    (trained["adapter"] / WITNESS_FILE).write_text("{}")
    manifest = trained["adapter"] / "run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "files": {WITNESS_FILE: "0" * 64}}))
    made = push(trained["adapter"], "me/pico", private=True, token=TOKEN)
    assert WITNESS_FILE not in made.files
    assert json.loads(hub.repos["me/pico"]["run.json"])["files"] == {}


def test_an_adapter_goes_there_whole_with_card_and_picture(hub, trained):
    from PIL import Image

    made = push(trained["adapter"], "me/pico", private=True, token=TOKEN)
    files = hub.repos["me/pico"]
    assert set(made.files) == set(files) - {".gitattributes"}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md", "loss.png"} == set(made.files)
    assert files["adapter_model.safetensors"] == (trained["adapter"] / "adapter_model.safetensors").read_bytes()
    assert (made.url, made.run_id, hub.private["me/pico"]) == (f"{hub.url}/me/pico", trained["run_id"], True)
    assert hub.messages == ["Upload adapter"]
    assert Image.open(io.BytesIO(files["loss.png"])).size == (720, 320)
    card = files["README.md"].decode()
    assert card.startswith('---\nlicense: "apache-2.0"\nlibrary_name: "peft"\n')
    for word in (
        "`" + "d" * 64 + "`",
        "| rows | 9 read = 5 trained on + 1 not reached + 2 held out + 1 dropped; 83% of an epoch |",
        "| `lora.r` | `8` |",
        "loss.png",
        trained["run_id"],
        "from 4 to 0.5 nats",
    ):
        assert word in card, word
    assert (
        "backprop train --model ./pico-base --data rows.jsonl --lora-r 8 --steps 8 --no-gradient-checkpointing --sample-prompt 'hello there'"
        in card
    )
    assert "/private/" not in card
    assert str(trained["base"].parent) not in card


def test_a_run_recorded_before_rows_were_counted_says_what_was_ready(hub, trained):
    store = RunStore(trained["adapter"].parent)
    store.update(trained["run_id"], lambda record: record.result.pop("rows"))
    card = prepare_push(trained["adapter"], "me/pico").card
    assert "| rows | 9 read, 8 whole, 0 truncated, 1 dropped, 0 held out |" in card


def test_what_comes_from_the_hub_is_named_with_its_commit(trained):
    record = find_origin(trained["adapter"]).record
    record.settings["model.name"]["value"], record.model["revision"] = "Qwen/Qwen2.5-0.5B", "c0ffee"
    record.settings["data.path"]["value"], record.data["revision"] = "someone/rows", "dada"
    record.settings["training.resume"] = {"value": True, "source": "flag"}
    command = write_train_command(record)
    assert command.startswith(
        "backprop train --model Qwen/Qwen2.5-0.5B --data someone/rows --revision c0ffee --data-revision dada "
    )
    assert "resume" not in command
    record.kind = "multi-run"
    assert write_train_command(record) is None


def test_a_gguf_finds_its_run_and_tells_its_parity(hub, trained):
    push(trained["gguf"], "me/pico-gguf", token=TOKEN)
    assert hub.repos["me/pico-gguf"]["model.gguf"] == trained["gguf"].read_bytes()
    card = hub.repos["me/pico-gguf"]["README.md"].decode()
    for word in (
        "| greedy | passed | 40 clear places of 72 |",
        "| stop | not tested | no turn ends |",
        "compared with the independent forward pass of the trained model. passed: 1 checks passed, 0 failed, 1 not tested",
        "ollama run hf.co/me/pico-gguf",
        'license: "apache-2.0"',
        "backprop export ./output/lora --quantization q8_0",
    ):
        assert word in card, word


def test_what_nobody_recorded_says_so(hub, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)  # whose card is nobody's business
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**config, "base_model_name_or_path": "base/known"})
    push(lora, "me/found", token=TOKEN)
    card = hub.repos["me/found"]["README.md"].decode()
    assert 'license: "apache-2.0"\nbase_model: "base/known"\nbase_model_relation: "adapter"' in card
    assert "There is no record of how it was made." in card
    assert "loss.png" not in hub.repos["me/found"]
    push(base, "me/model", token=TOKEN)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.repos["me/model"])
    assert "license:" not in hub.repos["me/model"]["README.md"].decode()
    push(export_adapter(base, quantization="q8_0").path, "me/gguf", token=TOKEN)
    assert "license:" not in hub.repos["me/gguf"]["README.md"].decode()


def test_what_is_there_is_replaced_only_by_force(hub, trained, tmp_path, capsys):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    argv = ["push", str(trained["adapter"]), "--repo", "me/pico", "--token-file", str(token)]
    assert main(argv) == 0
    assert f"{hub.url}/me/pico" in capsys.readouterr().out
    assert main(argv) == 1
    assert "[INPUT_HUB_PUSH_REPO_TAKEN]" in capsys.readouterr().err
    assert main([*argv, "--force", "--message", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repo"] == "me/pico"
    assert hub.messages == ["Upload adapter", "again"]
    with pytest.raises(PushRepoTakenError, match="README"):
        push(trained["gguf"], "me/pico", token=TOKEN)


def test_secrets_stay_here(hub, trained, tmp_path):
    with pytest.raises(PushDeniedError) as caught:
        push(trained["adapter"], "me/pico", token=SECRET)
    assert SECRET not in str(caught.value) + str(caught.value.cause)
    (trained["adapter"] / "notes.txt").write_text("mine")
    config = json.loads((trained["adapter"] / "adapter_config.json").read_text())
    (trained["adapter"] / "adapter_config.json").unlink()  # it is linked with the run's own
    write_json(trained["adapter"] / "adapter_config.json", {**config, "note": SECRET})
    with pytest.raises(PushSourceError, match="secret"):
        push(trained["adapter"], "me/pico", token=TOKEN)
    assert hub.repos == {}
    assert "notes.txt" not in prepare_push(trained["gguf"], "me/pico").shipment.files


HOMES = ("/home/ada-lovelace/models", "/Users/ada-lovelace", r"C:\Users\ada-lovelace\models", "/root" + "/models")


def test_no_folder_of_this_machine_goes_along(hub, trained, tmp_path):
    """Everything that is uploaded is searched, whoever wrote it."""
    merged = export_adapter(trained["adapter"], format="merged", output=tmp_path / "merged").path
    for folder, name in ((trained["adapter"], "tokenizer_config.json"), (merged, "config.json")):
        told = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        told |= {"_name_or_path": str(tmp_path / "x"), "notes": [f"made in {home} today" for home in HOMES]}
        write_json(folder / name, {**told, "files": list(HOMES)})
    write_manifest(trained["adapter"], run_id=trained["run_id"], base=str(trained["base"]), origin=merged_of(tmp_path))
    for name, source in (("lora", trained["adapter"]), ("gguf", trained["gguf"]), ("merged", merged)):
        push(source, f"me/{name}", token=TOKEN)
    for repo, files in hub.repos.items():
        for name, data in files.items():
            for word in (str(tmp_path), tmp_path.name, "lovelace", "/root"):
                assert word.encode() not in data, (repo, name, word)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name, data in hub.repos["me/lora"].items():
        (shipped / name).write_bytes(data)
    assert read_adapter_folder(shipped).base == "pico-base"
    assert changed_files(shipped) == []
    assert read_manifest(shipped)["origin"]["adapters"] == ["week-1", "week-2"]
    assert "--base ./pico-base" in hub.repos["me/lora"]["README.md"].decode()
    assert json.loads((trained["adapter"] / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        trained["base"]
    ), "the folder itself stays as it is"


def merged_of(folder):
    return {"method": "linear", "adapters": [str(folder / "week-1"), "../clients/week-2"]}


@pytest.mark.parametrize(
    ("named", "base", "told"),
    [
        ("/cache/hub/models--me--pico/snapshots/0123abc", None, "me/pico"),
        ("/models/pico", "me/pico-base", "me/pico-base"),
        ("me/pico", None, "me/pico"),
        (r"D:\models\pico", None, "pico"),
        ("mine/pico", None, "pico"),  # a folder here, and somebody's on the Hub
    ],
)
def test_the_base_is_told_by_a_name_that_others_know(tmp_path, monkeypatch, named, base, told, caplog):
    monkeypatch.chdir(tmp_path)
    Path("mine/pico").mkdir(parents=True)
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "base"))
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**config, "base_model_name_or_path": named})
    prepared = prepare_push(lora, "me/tuned", base=base)
    sent = prepared.shipment.contents["adapter_config.json"]
    sent = sent if isinstance(sent, bytes) else (lora / "adapter_config.json").read_bytes()
    assert json.loads(sent) == {**config, "base_model_name_or_path": told}
    assert (f'base_model: "{told}"' in prepared.card) == ("/" in told)
    assert ("Give its Hub id" in caplog.text) == ("/" not in told)
    with pytest.raises(PushSourceError, match="no folder and no Hub id"):
        prepare_push(lora, "me/tuned", base="no such folder")


def test_weights_that_name_a_folder_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("quantize.imatrix.file", "/home/ada-lovelace/matrix.dat")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    for folder, name in ((base, "model.safetensors"), (lora, "adapter_model.safetensors")):
        metadata = {"format": "pt", "config": r'{"output": "D:\\Users\\ada-lovelace\\out"}'}
        write_tensors(folder / name, {"x": np.ones((2, 2), np.float32)}, metadata=metadata)
    for source, key in ((tmp_path / "x.gguf", r"quantize\.imatrix\.file"), (base, "config"), (lora, "config")):
        with pytest.raises(PushSourceError, match=f"as {key}: "):
            prepare_push(source, "me/x")


@pytest.mark.parametrize(("base", "told"), [("base/listed", "mit"), ("base/x..y", None)])
def test_a_base_with_several_licences_or_an_impossible_name_stops_no_push(hub, tmp_path, base, told):
    adapter = write_lora(tmp_path / "lora", write_base(tmp_path / "pico-base"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": base})
    push(adapter, "me/pico", token=TOKEN)
    card = hub.repos["me/pico"]["README.md"].decode()
    assert ('license: "mit"' in card) == (told == "mit")


@pytest.mark.parametrize("repo", ["no slash", "me/" + "x" * 200, "me/a/b", "pico", "me/-x", "me/x..y"])
def test_names_that_the_hub_does_not_take_are_refused_at_once(hub, trained, repo):
    with pytest.raises(PushRepoInvalidError):
        push(trained["adapter"], repo, token=TOKEN)
    assert hub.calls == []


def test_what_is_nothing_is_not_pushed(hub, tmp_path):
    (tmp_path / "x.gguf").write_text("text")
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "base"))
    mlx = export_adapter(lora, format="mlx").path
    for source in (tmp_path, tmp_path / "none", tmp_path / "x.gguf", mlx):
        with pytest.raises(PushSourceError):
            push(source, "me/pico", token=TOKEN)
    assert hub.calls == []


def test_the_hubs_refusals(hub, trained, monkeypatch):
    with pytest.raises(PushDeniedError, match="nobody write"):
        push(trained["adapter"], "other/pico", token=TOKEN)
    hub.failure = "broken"
    with pytest.raises(PushRefusedError, match="status 400") as caught:
        push(trained["adapter"], "me/pico", token=TOKEN)
    assert "disk is full" in caught.value.cause
    hub.failure = "die"
    with pytest.raises(PushNetworkError):
        push(trained["adapter"], "me/pico", token=TOKEN)
    with pytest.raises(PushNetworkError):
        push(trained["adapter"], "me/pico", token=TOKEN, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (PermissionError(13, "Permission denied"), PushSourceError),
        (FileNotFoundError(2, "No such file"), PushSourceError),
        (socket.gaierror(-2, "Name or service not known"), PushNetworkError),
        (TimeoutError("timed out"), PushNetworkError),
        (ssl.SSLError("certificate"), PushNetworkError),
    ],
)
def test_a_file_that_cannot_be_read_is_no_fault_of_the_network(raised, told, hub, trained, monkeypatch):
    from huggingface_hub import HfApi

    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(told) as caught:
        push(trained["adapter"], "me/pico", token=TOKEN)
    assert str(raised) in caught.value.cause


def test_the_card_alone(hub, trained, capsys):
    assert main(["push", str(trained["gguf"]), "--repo", "me/pico", "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == prepare_push(trained["gguf"], "me/pico").card.strip()
    assert hub.calls == []
