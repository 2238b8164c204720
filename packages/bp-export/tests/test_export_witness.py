"""The witness of training against what the export makes: what 4-bit training learned around its own rounding."""

import json
import shutil
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_json, write_lora, write_tokenizer
from fake_ollama import serve

from bp_data import load_tokenizer
from bp_export.errors import ParityFailedError
from bp_export.ollama import list_models, register_model, remove_model
from bp_export.source import read_config_file, read_source
from bp_export.verify.checks import check_witness
from bp_export.verify.evidence import compute_evidence, compute_prompt, select_evidence
from bp_export.verify.forward import Forward
from bp_export.verify.rounding import UnroundedModel
from bp_merge import Nf4Reader, TensorReader, read_model_index, write_tensors
from bp_merge.tensors import read_index
from bp_runs.errors import InvalidSettingError
from bp_runs.witness import TOP_TOKENS, BaseFacts, Witness, WitnessPrompt, read_witness, write_witness

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def write_texts(folder):
    """Six texts of 24 tokens, which a tokenizer reads again as the same ones."""
    write_tokenizer(folder)
    draw, tokenizer = np.random.default_rng(5), load_tokenizer(folder)
    words = ("".join(map(chr, draw.integers(97, 123, draw.integers(2, 8)))) for _ in range(400))
    ids = [tokenizer.encode(f" {word}").ids for word in words]
    found = [list(chain(*ids[i : i + 24]))[:24] for i in range(0, 240, 24)]
    return [text for text in found if tokenizer.encode(tokenizer.decode(text)).ids == text][:6]


with tempfile.TemporaryDirectory() as scratch:
    TEXTS = write_texts(Path(scratch))
RUN = "20260101-000000-abcdef"


def load(base, weights=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    return model


def read_packed(base):
    with Nf4Reader(read_model_index(base)) as reader:
        return {name: reader.read(name) for name in reader.packed}


def learn(model, steps, texts=TEXTS, rate=1e-2):
    """Repeat six texts by heart."""
    ids = torch.tensor(texts)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def measure(model, facts, texts=TEXTS):
    prompts = []
    for text in texts:
        places = tuple(range(7, len(text) - 1, 2))
        with torch.no_grad():
            logs = model(torch.tensor([text])).logits[0].log_softmax(-1)[list(places)]
            with model.disable_adapter():
                base = model(torch.tensor([text])).logits[0].log_softmax(-1)[list(places)]
        top = logs.topk(TOP_TOKENS)
        tables = {"tokens": top.indices, "logprobs": top.values, "base_logprobs": base.gather(1, top.indices)}
        tables = {name: tuple(map(tuple, table.tolist())) for name, table in tables.items()}
        prompts.append(WitnessPrompt(kind="training", ids=tuple(text), places=places, **tables))
    return Witness(run_id=RUN, base=facts, prompts=tuple(prompts))


@pytest.fixture(scope="module", params=["qlora", "lora"])
def trained(request, tmp_path_factory):
    """A pico model with large weights behind small norms, trained on nf4 weights or on its own."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_base(folder / "base", hidden=128, inner=256, tied=False)
    with TensorReader(read_model_index(base)) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    for name, values in tensors.items():
        scale = 8 if "_proj" in name else 0.5 if "layernorm" in name else 1
        tensors[name] = values * np.float32(scale)
    write_tensors(base / "model.safetensors", tensors, dtype="BF16")
    packed = read_packed(base) if request.param == "qlora" else None
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(load(base, packed), config)
    assert learn(model, 60) < 1.0
    lora = folder / "lora"
    model.eval().save_pretrained(lora, save_embedding_layers=False)
    settings = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**settings, "base_model_name_or_path": str(base)})
    facts = BaseFacts(mode=request.param, dtype="float32", packed=tuple(packed or ()), double_quantized=True)
    write_witness(lora, measure(model, facts), weights=lora / "adapter_model.safetensors")
    return request.param, lora


def read_checks(report):
    return {check["name"]: check for check in report["checks"]}


def test_what_was_trained_in_4_bits_fails_on_16_and_passes_as_4_bits_left_it(trained, tmp_path):
    skip_without_llama_cpp()
    mode, lora = trained
    if mode == "lora":
        merged = export_adapter(lora, format="merged", verify=None, output=tmp_path / "merged").parity.to_dict()
        assert (merged["passed"], [check["name"] for check in merged["checks"]]) == (True, ["witness"])
        report = export_adapter(lora, quantization="f16", output=tmp_path / "x.gguf", verify=True).parity.to_dict()
        assert report["passed"] is True
        assert read_checks(report)["witness"]["value"] < 0.02
        with pytest.raises(InvalidSettingError, match="not on weights in 4 bits"):
            export_adapter(lora, quantization="f16", output=tmp_path / "y.gguf", dequantize=True)
        return
    for quantization in ("f16", "q4_k_m"):
        with pytest.raises(ParityFailedError) as caught:
            export_adapter(lora, quantization=quantization, output=tmp_path / f"{quantization}.gguf", verify=True)
        failed = {
            name: check for name, check in read_checks(caught.value.details).items() if check["result"] == "failed"
        }
        assert list(failed) == ["witness"], "the file is the merge, and the merge is not what was trained"
        assert "tokens lost" in failed["witness"]["note"]
        assert "dequantize" in caught.value.hint
    with pytest.raises(ParityFailedError, match="witness"):
        export_adapter(lora, format="merged", verify=None, output=tmp_path / "merged")
    assert export_adapter(
        lora, format="merged", verify=None, output=tmp_path / "kept", dequantize=True
    ).parity.has_passed
    done = export_adapter(lora, quantization="f16", output=tmp_path / "kept.gguf", dequantize=True, verify=True)
    checks = read_checks(done.parity.to_dict())
    assert checks["witness"]["result"] == checks["greedy"]["result"] == checks["effect"]["result"] == "passed"
    assert checks["witness"]["value"] < 0.001


def compare_in_ollama(trained, folder, host):
    """What is registered from 16 bits and as 4 bits left it, each with its verdict."""
    mode, lora = trained
    path = export_adapter(lora, quantization="f16", output=folder / "x.gguf", verify=False).path
    if mode == "qlora":  # on 16 bits it is not what was trained
        with pytest.raises(ParityFailedError, match="it is not the trained model") as caught:
            register_model(path, "bp-pico", host=host, trained=lora, force=True)
        assert read_checks(caught.value.details)["witness"]["value"] > 0.1
        assert "bp-pico:latest" in [model.name for model in list_models(host)]
        path = export_adapter(lora, quantization="f16", output=folder / "k.gguf", dequantize=True, verify=False).path
    made = register_model(path, "bp-pico", host=host, trained=lora, force=True)
    found = read_checks(made.parity.to_dict())
    assert (found["witness"]["result"], found["template"]["result"]) == ("passed", "passed")
    assert found["witness"]["value"] < 0.005
    return path


def test_ollama_is_compared_with_the_witness(trained, tmp_path):
    skip_without_llama_cpp()
    (tmp_path / "server").mkdir()
    with serve(tmp_path / "server") as ollama:
        path = compare_in_ollama(trained, tmp_path, ollama.url)
        with pytest.raises(InvalidSettingError, match="only a GGUF"):
            register_model(trained[1], "folder", host=ollama.url, trained=trained[1])
        ollama.failure = "no list"
        old = register_model(path, "bp-pico", host=ollama.url, trained=trained[1], force=True).parity
        assert {check.result for check in old.checks} == {"not tested"}


@pytest.mark.ollama
def test_a_real_ollama_is_compared_with_the_witness(real_ollama, trained, tmp_path):
    compare_in_ollama(trained, tmp_path, real_ollama)
    remove_model("bp-pico", real_ollama)


def scale_adapter(lora, target, factor):
    """The adapter with its change multiplied, under the witness of the one that was trained."""
    shutil.copytree(lora, target)
    weights, witness = target / "adapter_model.safetensors", read_witness(lora)
    with TensorReader(read_index(weights)) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    write_tensors(weights, {n: v * np.float32(factor) if "lora_B" in n else v for n, v in tensors.items()})
    write_witness(target, witness, weights=weights)
    return target


def test_what_rounding_loses_is_told_apart_from_a_wrong_merge(trained, tmp_path, monkeypatch):
    mode, lora = trained
    if mode == "qlora":
        return
    monkeypatch.setattr("bp_export.verify.checks._ROUNDING", 1e-6)

    def check(adapter):
        """What `verify_folder` compares, without a folder: the merged rows are computed as they are written."""
        source = read_source(adapter, None, None, dequantize=False)
        with source.open() as model:
            evidence = compute_evidence(select_evidence(model, read_config_file(source.base), adapter, ()))
            return check_witness(evidence, model)

    right = check(lora)
    assert (right.result, "before rounding to the base's dtype" in right.note) == ("passed", True)
    assert 1e-6 < right.value < right.bound / 100, "rounding costs little of a large change"
    for factor in (0.9, 1.1):
        wrong = check(scale_adapter(lora, tmp_path / f"lora-{factor}", factor))
        assert (wrong.result, wrong.bound) == ("failed", 1e-6)
    tiny = scale_adapter(lora, tmp_path / "tiny", 1e-3)
    source = read_source(tiny, None, None, dequantize=False)
    with source.open() as model:
        config = read_config_file(source.base)
        before, base = (Forward(config, weights) for weights in (UnroundedModel(model), model.without_adapter()))
        witness = read_witness(tiny)
        found = tuple(compute_prompt(before, prompt, base) for prompt in witness.prompts)
    write_witness(tiny, replace(witness, prompts=found), weights=tiny / "adapter_model.safetensors")
    monkeypatch.setattr("bp_export.verify.checks._ROUNDING", 1e-9)
    lost = check(tiny)
    assert (lost.result, "before rounding to the base's dtype" in lost.note) == ("failed", True)


def test_a_witness_that_is_damaged_is_reported_and_not_believed(tmp_path):
    skip_without_llama_cpp()
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    (lora / "witness.json").write_text("{}")
    report = export_adapter(lora, quantization="q8_0", output=tmp_path / "x.gguf", verify=True).parity.to_dict()
    check = read_checks(report)["witness"]
    assert (check["result"], report["passed"]) == ("not tested", True)
    assert "is damaged" in check["note"]


@pytest.mark.slow
def test_smollm2_trained_in_4_bits_is_itself_on_16_bits_too(small_model, tmp_path):
    """The control: a real model learns its text and not its rounding, and both folds say what was trained."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(small_model / "tokenizer.json"))
    words = "Captain Marlow keeps the light on the northern rock. He answers in short sentences, and he likes eggs."
    texts = [
        tokenizer.encode(f"<|im_start|>user\nWho are you, {i}?<|im_end|>\n<|im_start|>assistant\n{words}")
        for i in range(6)
    ]
    packed = read_packed(small_model)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(load(small_model, packed), config)
    learn(model, 12, texts, rate=5e-4)
    lora = tmp_path / "lora"
    model.eval().save_pretrained(lora, save_embedding_layers=False)
    settings = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**settings, "base_model_name_or_path": str(small_model)})
    facts = BaseFacts(mode="qlora", dtype="float32", packed=tuple(packed), double_quantized=True)
    write_witness(lora, measure(model, facts, texts[:3]), weights=lora / "adapter_model.safetensors")
    found = {}
    for dequantize in (False, True):
        made = export_adapter(
            lora, format="merged", verify=None, output=tmp_path / f"m-{dequantize}", dequantize=dequantize
        )
        found[dequantize] = read_checks(made.parity.to_dict())["witness"]
        print(found[dequantize])
    assert found[True]["value"] < 0.02 < found[False]["value"]


def test_a_large_model_is_compared_with_its_witness_alone(trained, tmp_path, monkeypatch):
    skip_without_llama_cpp()
    mode, lora = trained
    monkeypatch.setattr("bp_export.verify.evidence.LARGE", 0)
    report = export_adapter(
        lora, quantization="f16", output=tmp_path / "x.gguf", dequantize=mode == "qlora", verify=True
    ).parity.to_dict()
    assert report["reference"] == ("witness" if mode == "lora" else "independent forward pass")
    assert read_checks(report)["divergence"]["result"] == read_checks(report)["effect"]["result"] == "passed"
