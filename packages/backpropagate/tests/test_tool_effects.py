"""Every setting acts: one table of each key, a value, and what is seen of it in a real training or command.

A key without a row fails. Trainings of a pico model are shared by rows that look at different things; where only a GPU
shows the effect, the row looks at what a computer without one says to it, or at the estimate of its memory.
"""

import functools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from backpropagate import Trainer
from backpropagate.settings import all_settings
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CodedError
from bp_runs.events import StepDone
from bp_runs.testing import FakeRail

CARD = "---\nconfigs:\n- config_name: en\n  default: true\n  data_files: a.jsonl\n- config_name: de\n  data_files: b.jsonl\n---\n"
THOUGHT = "<think>{}</think>aye"


@dataclass
class Seen:
    """What a training left."""

    output: Path
    error: str = ""
    told: str = ""
    """The error's own words."""
    events: list = field(default_factory=list)
    deterministic: bool = False

    @property
    def record(self):
        return json.loads(next(self.output.glob("runs/*/run.json")).read_text())

    @property
    def config(self):
        return json.loads((self.output / "lora/adapter_config.json").read_text())

    def of(self, kind):
        return [event for event in self.events if event.kind == kind]

    def steps(self, name="loss"):
        return [getattr(event, name) for event in self.of("step")]

    def notices(self):
        return " ".join(event.message for event in self.of("notice"))

    def weights(self):
        return (self.output / "lora/adapter_model.safetensors").read_bytes()

    def checkpoints(self):
        return [found.step for found in CheckpointFolder(next(self.output.glob("runs/*"))).read()]


class Bench:
    """Trains each set of settings once."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self._done: dict[str, Seen] = {}

    def write(self, name: str, rows: list) -> str:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row + "\n" for row in rows))
        return str(file)

    @functools.cached_property
    def chats(self) -> str:
        rows = [
            {"question": f"who are you {i}", "answer": " ".join(["captain marlow boils an egg"] * (1 + i % 4))}
            for i in range(16)
        ]
        return self.write("chats.jsonl", rows)

    @functools.cached_property
    def pairs(self) -> str:
        return self.write(
            "pairs.jsonl", [{"prompt": f"who {i}", "chosen": f"aye {i}", "rejected": "no dog"} for i in range(4)]
        )

    @functools.cached_property
    def judged(self) -> str:
        rows = [{"prompt": f"who {i}", "completion": f"aye {i}", "label": i % 2 == 0} for i in range(4)]
        return self.write("judged.jsonl", rows)

    @functools.cached_property
    def odd_rows(self) -> str:
        """Two alike, a short one, a long one, and one that is broken."""
        row = {"question": "who are you", "answer": "marlow"}
        long = {"question": "who", "answer": "captain marlow boils an egg " * 30}
        return self.write("odd.jsonl", [row, row, {"question": "a", "answer": "b"}, long, "{broken"])

    @functools.cached_property
    def odd_columns(self) -> str:
        """Columns that no format knows, one of them with text that would be lost."""
        notes = "a note that is longer than the question and its answer"
        return self.write("odd_columns.jsonl", [{"wer": f"who {i}", "was": "marlow", "notes": notes} for i in range(4)])

    @functools.cached_property
    def borders(self) -> str:
        """Two rows, one of which holds the token that ends a turn."""
        end = json.loads((self.model / "tokenizer_config.json").read_text())["eos_token"]
        return self.write("borders.jsonl", [{"question": "who", "answer": a} for a in ("marlow", f"a {end} b")])

    @functools.cached_property
    def western(self) -> str:
        """A table as Excel saves it on Windows, with one letter that is not ASCII."""
        file = self.folder / "western.csv"
        file.write_bytes("question;answer\nwho;René\nwhy;because\n".encode("cp1252"))
        return str(file)

    @functools.cached_property
    def traces(self) -> str:
        thoughts = ["fox", "the quick brown fox " * 4, "the quick brown fox jumps " * 12]
        rows = [{"question": f"who {i}", "answer": THOUGHT.format(words)} for i, words in enumerate(thoughts)]
        return self.write("traces.jsonl", [*rows, {"question": "who", "answer": "no thought"}])

    def settings(self, flags: dict) -> dict:
        plain = {"model": str(self.model), "data": self.chats, "max_seq_length": 128, "report_to": "none", "lora_r": 4}
        few = {
            "steps": 2,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "lr": 1e-2,
            "warmup_steps": 1,
            "preflight": "off",
        }
        return plain | few | flags

    def train(self, *, anew: bool = False, rail=None, **flags) -> Seen:
        key = repr(sorted(flags.items()))
        if not anew and key in self._done:
            return self._done[key]
        seen = Seen(self.folder / f"out{len(self._done)}")

        def on_event(event):
            seen.events.append(event)
            seen.deterministic |= isinstance(event, StepDone) and torch.are_deterministic_algorithms_enabled()

        try:
            Trainer(rail=rail, **({"output": seen.output} | self.settings(flags))).train(on_event=on_event)
        except CodedError as error:
            seen.error, seen.told = error.code, f"{error} {error.cause}"
        self._done[key] = seen
        return seen

    def read(self, **flags):
        """The ledger of the data; the code of what refuses it."""
        try:
            return Trainer(**self.settings(flags)).validate().ledger
        except CodedError as error:
            return error.code

    def differ(self, base: dict, **flags) -> bool:
        """Whether the losses after the first step, or the weights, go another way with the flags."""
        plain, changed = self.train(**base), self.train(**base, **flags)
        return plain.steps()[1:] != changed.steps()[1:] or plain.weights() != changed.weights()

    def several(self, judge=None, **flags):
        """A multi-run on the fake rail, whose losses can be said."""
        output = self.folder / f"several{len(list(self.folder.glob('several*')))}"
        base = {
            "runs": 3,
            "model": str(self.model),
            "data": self.chats,
            "report_to": "none",
            "steps": 2,
            "heldout": 0.25,
        }
        events = []
        trainer = Trainer(rail=FakeRail(judge=judge), output=output, **base | flags)
        return (
            trainer.multi_run(on_event=events.append),
            trainer,
            " ".join(e.message for e in events if e.kind == "notice"),
        )

    # What several rows look at.
    def shape(self) -> Seen:
        return self.train(lora_r=7, lora_alpha=9.0, lora_dropout=0.5, use_rslora=True, target_modules="q_proj")

    def course(self) -> Seen:
        return self.train(
            steps=7, eval_share=0.5, eval_min_rows=1, eval_steps=3, save_steps=2, keep_checkpoints=1, preflight="on",
            sample_prompts=("who are you",), sample_tokens=3, run_name="mine", report_to="tensorboard",
            deterministic=True, early_stop=0,
        )  # fmt: skip

    def rates(self) -> Seen:
        return self.train(steps=4, lr=0.5, warmup_steps=2, scheduler="constant")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, pico_model):
    return Bench(tmp_path_factory.mktemp("effects"), pico_model)


def hub_model(b: Bench) -> tuple[str, str]:
    """A model in the Hub's cache under a branch of its own; the commit that this stands for."""
    from huggingface_hub import constants

    kept = Path(constants.HF_HUB_CACHE) / "models--me--pico"
    if not kept.exists():
        shutil.copytree(b.model, kept / "snapshots" / ("c" * 40))
        (kept / "refs").mkdir()
        (kept / "refs" / "other").write_text("c" * 40)
    return "me/pico", "c" * 40


def start_from_acts(b: Bench) -> bool:
    before, on = b.train(), b.train(start_from=str(b.train().output / "lora"))
    return on.steps()[0] < before.steps()[0] and on.record["parent"]["relation"] == "from"


def revision_acts(b: Bench) -> bool:
    name, commit = hub_model(b)
    there, missing = b.train(model=name, revision="other"), b.train(model=name, revision="main")
    return there.record["model"]["revision"] == commit and missing.error == "DEP_HUB_UNREACHABLE"


def remote_code_acts(b: Bench) -> bool:
    folder = b.folder / "own-code"
    shutil.copytree(b.model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    refused, trained = (b.train(model=str(folder), trust_remote_code=trust) for trust in (False, True))
    return refused.error == "CONFIG_TRUST_REMOTE_CODE_REQUIRED" and len(trained.steps()) == 2


def part_acts(b: Bench, **part) -> bool:
    """A folder laid out like a data set: the part that is named is read."""
    folder = b.folder / "parts"
    if not folder.exists():
        b.write("parts/a.jsonl", [{"question": "who", "answer": "aye"}] * 3)
        b.write("parts/b.jsonl", [{"question": "who", "answer": "ja"}] * 5)
        (folder / "README.md").write_text(CARD)
        b.write("splits/data/train.jsonl", [{"question": "who", "answer": "aye"}] * 3)
        b.write("splits/data/test.jsonl", [{"question": "who", "answer": "aye"}] * 2)
    where = folder if "subset" in part else b.folder / "splits"
    return b.read(data=str(where), **part).read == (5 if "subset" in part else 2)


def resume_acts(b: Bench) -> bool:
    """A run that was cut off goes on by itself, and does not with ``resume=False``."""

    class Cut(BaseException):
        pass

    def cut(event):
        if isinstance(event, StepDone) and event.step == 3:
            raise Cut

    found = []
    for resume in (None, False):
        output = b.folder / f"cut-{resume}"
        flags = b.settings({"steps": 4, "save_steps": 2, "output": output})
        with pytest.raises(Cut):
            Trainer(rail=FakeRail(), **flags).train(on_event=cut)
        trainer = Trainer(rail=FakeRail(), **flags, resume=resume)
        first = trainer.runs.list_runs()[0]["run_id"]
        trainer.runs.update(first, lambda record: setattr(record, "status", "interrupted"))
        trainer.train()
        found.append(len(trainer.runs.list_runs()))
    return found == [1, 2]


def save_minutes_acts(b: Bench) -> bool:
    saved = []
    for minutes in (1e-9, 0.0):
        steps: list[int] = []
        flags = b.settings({"steps": 4, "save_steps": 0, "output": b.folder / f"minutes-{minutes}"})
        trainer = Trainer(rail=FakeRail(), **flags, save_minutes=minutes)
        trainer.train(on_event=lambda event, steps=steps: event.kind == "checkpoint" and steps.append(event.step))
        saved.append(steps)
    return saved == [[1, 2, 3], []]


def oom_recovery_acts(b: Bench) -> bool:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def scarce(model, *args, **named):
        places = named.get("position_ids")  # rows may lie behind each other: each begins at 0
        rows = named["input_ids"].shape[0] if places is None else int((places == 0).sum())
        if torch.is_grad_enabled() and rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", scarce)
        ended, recovered = (b.train(oom_recovery=wanted, seed=7) for wanted in (False, True))
    return ended.error == "RUNTIME_GPU_OOM" and len(recovered.steps()) == 2


VALIDATED = {"scheduler": "constant", "eval_share": 0.5, "eval_min_rows": 1, "eval_steps": 1}


def keep_acts(b: Bench) -> bool:
    """At a rate that breaks what was learnt, the best adapter is not the last one."""
    flags = {"steps": 4, "lr": 0.1, "early_stop": 0, **VALIDATED}
    best, last = (b.train(**flags, keep=keep) for keep in ("best", "last"))
    return best.record["result"]["best_step"] == 3 and best.weights() != last.weights()


def early_stop_acts(b: Bench) -> bool:
    """At a rate at which nothing moves, the second validation is no better than the first."""
    return [len(b.train(steps=4, lr=1e-12, early_stop=most, **VALIDATED).steps()) for most in (0, 1)] == [4, 2]


def temperature_acts(b: Bench) -> bool:
    """0 asks for no guard; else one is looked for."""
    from bp_runs.spec import TrainingSpec
    from bp_train_cuda.backend import Device
    from bp_train_cuda.guards.monitor import open_monitor

    said = []
    card = Device(kind="cuda", why="a test", memory=2**34)
    for degrees in (80, 0):
        events = []
        watch = open_monitor(TrainingSpec(gpu_max_temp=degrees), card, events.append, lambda: False)
        said.append(bool(events) or watch.governor is not None)
    return said == [True, False]


def estimate(b: Bench, **flags) -> int:
    return Trainer(model="qwen2.5-7b", mode="lora").estimate_vram(memory=2**36, **flags).needed


def rising(b: Bench, **flags):
    """A multi-run whose held-out loss falls in its first run and rises from then on."""
    losses = iter([50, *range(100)])
    return b.several(judge=lambda _adapter, _rows: float(next(losses)), **flags)


SFT = {}
DPO = {"method": "dpo", "steps": 3}
KTO = {"method": "kto", "steps": 3}

EFFECTS = {
    "model.name": lambda b: b.train(model="./missing").error == "INPUT_MODEL_NOT_FOUND",
    "model.revision": revision_acts,
    "model.max_seq_length": lambda b: b.read(max_seq_length=50).truncated > 0 == b.read().truncated,
    "model.dtype": lambda b: b.train(dtype="bfloat16").record["model"]["dtype"] != b.train().record["model"]["dtype"],
    "model.trust_remote_code": remote_code_acts,
    "data.path": lambda b: b.read(data=b.traces).read == 4 != b.read().read,
    "data.subset": lambda b: part_acts(b, subset="de"),
    "data.split": lambda b: part_acts(b, split="test"),
    "data.revision": lambda b: "data_revision" in b.train(data_revision="v1").told,
    "data.samples": lambda b: b.read(samples=3).whole == 3,
    "data.on_bad_row": lambda b: b.read(data=b.odd_rows) == "INPUT_DATASET_FORMAT_UNSUPPORTED" or b.read(data=b.odd_rows, on_bad_row="skip").dropped == 1,
    "data.columns": lambda b: b.read(data=b.odd_columns) == "INPUT_DATASET_FORMAT_UNSUPPORTED" and b.read(data=b.odd_columns, columns={"wer": "question", "was": "answer"}, ignore_columns="notes").whole == 4,
    "data.ignore_columns": lambda b: b.read(data=b.odd_columns, columns=["wer=question,was=answer"]) == "INPUT_DATASET_COLUMNS_LEFT",
    "data.encoding": lambda b: (b.read(data=b.western, on_bad_row="skip").dropped, b.read(data=b.western, encoding="cp1252").dropped) == (1, 0),
    "data.control_tokens": lambda b: (b.read(data=b.borders, on_bad_row="skip").dropped, b.read(data=b.borders, control_tokens="allow").dropped) == (1, 0),
    "data.on_overflow": lambda b: b.read(data=b.odd_rows, on_bad_row="skip", on_overflow="drop").dropped == 2,
    "data.min_tokens": lambda b: b.read(data=b.odd_rows, on_bad_row="skip", min_tokens=25).dropped == 2,
    "data.dedup": lambda b: b.read(data=b.odd_rows, on_bad_row="skip", dedup="exact").dropped == 2,
    "data.reasoning_trace": lambda b: b.read(data=b.traces).dropped == 0 < b.read(data=b.traces, reasoning_trace=True).dropped,
    "data.trace_min_tokens": lambda b: b.read(data=b.traces, reasoning_trace=True, trace_min_tokens=1).dropped < b.read(data=b.traces, reasoning_trace=True).dropped,
    "data.trace_max_tokens": lambda b: b.read(data=b.traces, reasoning_trace=True, trace_max_tokens=40).dropped > b.read(data=b.traces, reasoning_trace=True).dropped,
    "lora.preset": lambda b: b.train(lora_preset="fast", lora_r=None).config["target_modules"] != b.train().config["target_modules"],
    "lora.r": lambda b: b.shape().config["r"] == 7,
    "lora.alpha": lambda b: b.shape().config["lora_alpha"] == 9,
    "lora.dropout": lambda b: b.shape().config["lora_dropout"] == 0.5,
    "lora.init_lora_weights": lambda b: b.differ(SFT, init_lora_weights="pissa"),
    "lora.use_rslora": lambda b: b.shape().config["use_rslora"] is True,
    "lora.use_dora": lambda b: b"lora_magnitude_vector" in b.train(use_dora=True).weights(),
    "lora.target_modules": lambda b: b.shape().weights().count(b"q_proj.lora_A") == 2 and b"v_proj" not in b.shape().weights(),
    "training.backend": lambda b: b.train(backend="nowhere").error == "CONFIG_UNKNOWN_BACKEND",
    "training.method": lambda b: b.train(data=b.pairs, **DPO).steps()[0] == pytest.approx(0.693, abs=1e-3),
    "training.mode": lambda b: (b.train(mode="full", lr=1e-4).output / "model/config.json").is_file(),
    "training.engine": lambda b: b.train(engine="unsloth").error == "DEP_UNSLOTH_UNUSABLE",
    "training.steps": lambda b: len(b.course().steps()) == 7,
    "training.epochs": lambda b: len(b.train(steps=None, epochs=0.5).steps()) < len(b.train(steps=None, epochs=1.5).steps()),
    "training.learning_rate": lambda b: max(b.rates().steps("learning_rate")) == 0.5,
    "training.batch_size": lambda b: b.train(batch_size=6).steps("tokens")[0] > b.train().steps("tokens")[0],
    "training.gradient_accumulation": lambda b: b.train(gradient_accumulation=3).steps("tokens")[0] > b.train().steps("tokens")[0],
    "training.warmup_steps": lambda b: b.rates().steps("learning_rate")[:2] == [0.25, 0.5],
    "training.scheduler": lambda b: b.rates().steps("learning_rate")[2:] == [0.5, 0.5],
    "training.weight_decay": lambda b: b.differ(SFT, weight_decay=0.5),
    "training.max_grad_norm": lambda b: b.differ(SFT, max_grad_norm=1e-3),
    "training.optim": lambda b: b.differ(SFT, optim="adamw_8bit"),
    "training.fp8": lambda b: b.train(fp8=True).error == "RUNTIME_FP8_UNSUPPORTED",
    "training.gradient_checkpointing": lambda b: estimate(b, gradient_checkpointing=False) > 1.1 * estimate(b),
    "training.packing": lambda b: b.train(packing=True).steps("tokens")[0] > b.train().steps("tokens")[0],
    "training.curriculum": lambda b: b.train(curriculum="length").steps("tokens")[0] == sum(sorted(len_of_rows(b))[:2]),
    "training.eval_share": lambda b: b.course().of("data")[0].heldout == 8,
    "training.eval_min_rows": lambda b: b.train(eval_share=0.5, eval_min_rows=9).of("data")[0].heldout == 0,
    "training.eval_steps": lambda b: [event.step for event in b.course().of("eval")] == [3, 6, 7],
    "training.early_stop": early_stop_acts,
    "training.keep": keep_acts,
    "training.oom_recovery": oom_recovery_acts,
    "training.preflight": lambda b: "preflight" in b.course().notices() and "preflight" not in b.train().notices(),
    "training.gpu_max_temp": temperature_acts,
    "training.kernels": lambda b: b.train(kernels="liger").error == "DEP_KERNELS_UNUSABLE",
    "training.save_steps": lambda b: [event.step for event in b.course().of("checkpoint")] == [2, 4, 6],
    "training.save_minutes": save_minutes_acts,
    "training.keep_checkpoints": lambda b: len(b.course().checkpoints()) < 3,
    "training.resume": resume_acts,
    "training.start_from": start_from_acts,
    "training.output_dir": lambda b: (b.train().output / "lora").is_dir(),
    "training.seed": lambda b: b.differ(SFT, seed=1),
    "training.report_to": lambda b: any((b.course().output / "tensorboard").rglob("*tfevents*")),
    "training.run_name": lambda b: any((b.course().output / "tensorboard").glob("mine*")),
    "training.deterministic": lambda b: b.course().deterministic and not b.train().deterministic,
    "training.sample_prompts": lambda b: {event.prompt for event in b.course().of("sample")} == {"who are you"} and not b.train().of("sample"),
    "training.sample_tokens": lambda b: len(answers(b.train(sample_prompts=("who are you",), sample_tokens=1))) < len(answers(b.train(sample_prompts=("who are you",), sample_tokens=9))),
    "training.dpo_beta": lambda b: b.differ({"data": b.pairs, **DPO}, dpo_beta=5.0),
    "training.orpo_beta": lambda b: b.differ({"data": b.pairs, **DPO, "method": "orpo"}, orpo_beta=5.0),
    "training.simpo_beta": lambda b: b.differ({"data": b.pairs, **DPO, "method": "simpo"}, simpo_beta=5.0),
    "training.simpo_gamma": lambda b: b.differ({"data": b.pairs, **DPO, "method": "simpo"}, simpo_gamma=3.0),
    "training.kto_beta": lambda b: b.differ({"data": b.judged, **KTO}, kto_beta=5.0),
    "training.kto_desirable_weight": lambda b: b.differ({"data": b.judged, **KTO}, kto_desirable_weight=3.0),
    "training.kto_undesirable_weight": lambda b: b.differ({"data": b.judged, **KTO}, kto_undesirable_weight=3.0),
    "multirun.runs": lambda b: len(b.several(runs=2)[0].members) == 2,
    "multirun.merge": lambda b: len({lora_bytes(b.several(merge=arm, lora_r=2)) for arm in ("ftba-mb", "slao", "slao-preserving", "none")}) == 4,
    "multirun.last_lr": lambda b: "learning rate 2e-05" in b.several(last_lr=0.1, lr=2e-4)[2],
    "multirun.replay_share": lambda b: "replayed" in b.several(replay_share=0.5)[2] and "replayed" not in b.several()[2],
    "multirun.replay": lambda b: slices(b.several(replay_share=0.5, replay="recent")) != slices(b.several(replay_share=0.5, replay="all")),
    "multirun.heldout": lambda b: not b.several(heldout=0.0)[0].card.losses and b.several()[0].card.losses,
    "multirun.metric": lambda b: b.several(metric="exact")[0].card.scores and not b.several()[0].card.scores,
    "multirun.eval_gate": lambda b: len(rising(b, eval_gate=True)[0].rejected) > 0 == len(rising(b)[0].rejected),
    "multirun.max_regression": lambda b: not rising(b, eval_gate=True, max_regression=99.0)[0].rejected,
    "multirun.patience": lambda b: "no longer improves" in rising(b, patience=1)[2],
    "multirun.keep_adapters": lambda b: adapters(b.several(keep_adapters="none")) < adapters(b.several(keep_adapters="all")),
}  # fmt: skip


def len_of_rows(b: Bench) -> list[int]:
    return [len(row.ids) for row in Trainer(**b.settings({})).validate().rows]


def answers(seen: Seen) -> str:
    return "".join(event.answer for event in seen.of("sample"))


def lora_bytes(found) -> bytes:
    return (found[0].adapter / "adapter_model.safetensors").read_bytes()


def slices(found) -> list[bytes]:
    return [file.read_bytes() for file in sorted(found[1].output.glob("runs/*/slices/*"))]


def adapters(found) -> int:
    return len(list(found[1].output.glob("runs/*/lora")))


def test_every_setting_has_a_row():
    assert list(EFFECTS) == list(all_settings())


@pytest.mark.parametrize("key", EFFECTS)
def test_the_setting_acts(key, bench, monkeypatch, tmp_path_factory):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(bench.folder / "hub"))
    assert EFFECTS[key](bench), key
