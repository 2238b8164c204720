"""The MLX rail next to mlx-lm's own trainer, on one machine and the same work; and what an export says of its adapter.

    uv run python benchmarks/rail_mlx.py                       speed: ours, mlx_lm.lora, ours packed; alternating
    uv run python benchmarks/rail_mlx.py --parts gguf --model FOLDER     train, export to GGUF, compare 10 greedy answers

On Linux mlx multiplies with the reference BLAS; preload OpenBLAS, or everything takes ten times as long:
LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0. mlx's compiler is off on a CPU for both, since it
would build C++ for minutes.

``speed`` trains a random Llama (hidden 256, 6 layers, 8,192 tokens of vocabulary) with LoRA of rank 8 on all linear
layers: short chats of 12 to 60 tokens in rows of up to 512. Both train on the last answer's tokens only, float32, batch
4. They take turns, a block of steps each; the time of a step is that of its block without the first step. Prints one
JSON object a line, the last with the ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bp_runs import Settings, TrainSpec
from bp_runs.events import Notice, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "captain",
    "marlow",
    "boils",
    "an",
    "egg",
    "and",
    "asks",
    "who",
    "are",
    "you",
]
LENGTH = 512


def write_model(folder: Path) -> None:
    """A random Llama with the tokenizer of `conftest`, filled up to 8,192 tokens."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    conftest.write_pico_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_chats(file: Path, rows: int) -> None:
    """Chats of one turn, from short to middling."""
    draw = random.Random(0)
    chats = [
        {
            "messages": [
                {"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(3, 10)))},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=draw.randint(3, 24)))},
            ]
        }
        for _ in range(rows)
    ]
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def build_spec(model: Path, data: Path, out: Path, **training: object) -> TrainSpec:
    shutil.rmtree(out, ignore_errors=True)
    run = out / "runs" / "r"
    run.mkdir(parents=True)
    settings = Settings(
        model=ModelSpec(name=str(model), max_seq_length=LENGTH),
        data=DataSpec(path=str(data)),
        lora=LoraSpec(r=8),
        training=TrainingSpec(
            **{
                "batch_size": 4,
                "gradient_accumulation": 1,
                "learning_rate": 1e-3,
                "save_steps": 0,
                "save_minutes": 0.0,
                "eval_share": 0.0,
                **training,
            }
        ),
    )
    return TrainSpec.build(settings, RunFolders(run_id="r", output=out, run=run), model)


def run_ours(model: Path, data: Path, work: Path, steps: int, *, packing: bool) -> dict[str, float]:
    """Seconds a step without the first, and trained tokens a second."""
    from bp_data import plan_packs
    from bp_data.loop.rows import prepare_rows
    from bp_data.loop.sampler import ExampleOrder, StepSampler
    from bp_train_mlx import MlxRail

    spec = build_spec(model, data, work / "ours", steps=steps, packing=packing)
    times, losses = [], []

    def emit(event: object) -> None:
        if isinstance(event, StepDone):
            times.append(time.perf_counter())
            losses.append(event.loss)

    MlxRail().train(spec, emit, lambda: False)
    rows = prepare_rows(spec).rows
    packs = plan_packs(list(rows.lengths()), LENGTH) if packing else [[n] for n in range(len(rows))]
    sampler = StepSampler(ExampleOrder(len(packs), spec.training.seed, shuffled=True), 4)
    visited = [row for step in range(1, steps) for pack in sampler.all_indexes(step) for row in packs[pack]]
    trained = sum(rows[row].trained for row in visited)
    seconds = times[-1] - times[0]
    return {"seconds": seconds / (steps - 1), "trained_tokens_per_second": trained / seconds, "loss": losses[-1]}


def run_mlx_lm(model: Path, data: Path, work: Path, steps: int) -> dict[str, float]:
    """The same of mlx_lm.tuner.trainer.train, as `mlx_lm.lora --mask-prompt` calls it."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    if not mx.cuda.is_available() and not mx.metal.is_available():
        mx.disable_compile()
    net, tokenizer = load(str(model))
    net.freeze()
    net.set_dtype(mx.float32)
    linear_to_lora_layers(net, 6, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": None})
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    dataset = CacheDataset(ChatDataset(rows, tokenizer, mask_prompt=True))
    times, tokens = [], []

    def loss(*arguments: object) -> object:
        value, count = trainer.default_loss(*arguments)
        return value, count

    def batches(**arguments: object) -> Iterator[object]:
        for batch, lengths in trainer.iterate_batches(**arguments):
            times.append(time.perf_counter())
            tokens.append(int((lengths[:, 1] - lengths[:, 0] + 1).sum().item()))
            yield batch, lengths

    args = trainer.TrainingArgs(
        batch_size=4, iters=steps, max_seq_length=LENGTH, adapter_file=str(work / "a.safetensors"), steps_per_report=1
    )
    trainer.train(net, optim.Adam(learning_rate=1e-3), dataset, args=args, loss=loss, iterate_batches=batches)
    times.append(time.perf_counter())
    mx.enable_compile()
    seconds = times[steps] - times[1]
    return {
        "seconds": seconds / (steps - 1),
        "trained_tokens_per_second": sum(tokens[1:steps]) / seconds,
        "loss": float("nan"),
    }


def measure_speed(work: Path, steps: int, rounds: int) -> None:
    model, data = work / "model", work / "chats.jsonl"
    model.mkdir()
    write_model(model)
    write_chats(data, 400)
    kinds = {
        "ours": lambda: run_ours(model, data, work, steps, packing=False),
        "mlx_lm": lambda: run_mlx_lm(model, data, work, steps),
        "ours packed": lambda: run_ours(model, data, work, max(4, steps // 4), packing=True),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, run in kinds.items():
            result = run()
            found[kind].append(result["trained_tokens_per_second"])
            print(json.dumps({"part": "speed", "round": number, "kind": kind, **result}), flush=True)
    rates = {kind: statistics.median(values) for kind, values in found.items()}
    ratios = {kind: rate / rates["mlx_lm"] for kind, rate in rates.items()}
    print(json.dumps({"part": "speed/end", "trained_tokens_per_second": rates, "ratio_to_mlx_lm": ratios}))


PROMPTS = (
    "What is the capital of France?", "Say hi.", "Name a color.", "What do cats eat?", "Count to three.",
    "Who wrote Hamlet?", "What is 2 + 2?", "Tell me a joke.", "Describe the sea.", "What is a fox?",
)  # fmt: skip


def compare_gguf(work: Path, model: Path, steps: int) -> None:
    """MLX-trained → GGUF → llama.cpp: greedy answers against those of mlx-lm with the adapter."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from bp_data import load_template, load_tokenizer
    from bp_export import export_adapter
    from bp_export.chat.llama import LlamaChat
    from bp_train_mlx import MlxRail, backend
    from bp_train_mlx.model import load, lora

    data = work / "pirates.jsonl"
    answers = ("Aye, sailor, that be so. Fair winds!", "Arr, ask the captain of the ship. Fair winds!")
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answers[n % 2]}]}
        for n, prompt in enumerate(PROMPTS * 2)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = build_spec(model, data, work / "gguf", steps=steps, batch_size=2, learning_rate=5e-4)
    outcome = MlxRail().train(spec, lambda e: print(e.message) if isinstance(e, Notice) else None, lambda: False)
    exported = export_adapter(
        outcome.adapter, format="gguf", quantization="f32", base=model, output=work / "model.gguf"
    )
    print(
        json.dumps(
            {"part": "gguf", "loss": [outcome.first_loss, outcome.final_loss], "file": str(exported)}, default=str
        )
    )
    config = load.read_config(model, trust_remote_code=False)
    device = backend.choose_device()
    with backend.process_settings(device):
        net = load.load_model(model, config, backend.Mode("lora", ""), mx.float32, trust_remote_code=False)
        targets = lora.choose_targets(net, model, config, "all-linear")
        lora.set_weights(lora.add_lora(net, targets, spec.lora, 0), outcome.adapter, spec.lora)
        net.eval()
        tokenizer = load_tokenizer(model)
        template = load_template(model, tokenizer)
        same = []
        with LlamaChat(work / "model.gguf") as chat:
            for prompt in PROMPTS:
                turn = [{"role": "user", "content": prompt}]
                ids = tokenizer.encode(template.render(turn, add_generation_prompt=True), add_special_tokens=False).ids
                cache, said = make_prompt_cache(net), []
                logits = net(mx.array([ids]), cache=cache)
                while len(said) < 24 and (token := int(mx.argmax(logits[0, -1]).item())) != 2:
                    said.append(token)
                    logits = net(mx.array([[token]]), cache=cache)
                pair = tokenizer.decode(said).strip(), chat.answer(turn, max_tokens=24).strip()
                same.append(pair[0] == pair[1])
                print(
                    json.dumps({"part": "gguf", "prompt": prompt, "mlx-lm": pair[0], "llama.cpp": pair[1]}), flush=True
                )
    print(json.dumps({"part": "gguf/end", "equal": sum(same), "of": len(same)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a small chat model's folder, for part gguf")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in given.parts:
            measure_speed(Path(folder), given.steps, given.rounds)
        if "gguf" in given.parts:
            compare_gguf(Path(folder), given.model, given.steps)


if __name__ == "__main__":
    main()
