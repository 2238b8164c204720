"""Talking: every kind of target says what its GGUF says, in pieces; conversations keep what was said."""

import io
import json
import os
import signal
import sys
import tempfile
import time

import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_lora
from fake_ollama import serve

from bp_export.chat import ChatOptions, LlamaChat, ask_once, converse, open_session
from bp_export.chat.conversation import Conversation
from bp_export.chat.server import LlamaServer
from bp_export.cli.app import main
from bp_export.errors import ChatFailedError, ChatTargetError, ContextFullError
from bp_export.ollama import register_gguf

skip_without_llama_cpp()

QUESTION = "the cat sat"
SHORT = ChatOptions(max_tokens=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter on it, and what the two say as one bf16 file in llama.cpp."""
    folder = tmp_path_factory.mktemp("chat")
    base = write_base(folder / "base")
    lora = write_lora(folder / "lora", base)
    gguf = export_adapter(lora, quantization="bf16").path
    with LlamaChat(gguf) as chat:
        # A stream keeps back the half of a character at which the limit cuts.
        said = chat.answer([{"role": "user", "content": QUESTION}], max_tokens=6).rstrip("\ufffd")
    return {
        "base": base,
        "lora": lora,
        "gguf": gguf,
        "merged": export_adapter(lora, format="merged").path,
        "said": said,
    }


@pytest.mark.parametrize("kind", ["gguf", "lora", "merged"])
def test_every_kind_says_the_same_in_pieces(made, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_session(made[kind]) as talk:
        pieces = list(ask_once(talk, QUESTION, SHORT))
        assert len(list(tmp_path.rglob("*.gguf"))) == (kind != "gguf")
    assert "".join(pieces) == made["said"]
    assert len(pieces) > 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_asks_once(made, capsys):
    argv = ["chat", str(made["gguf"]), "--prompt", QUESTION, "--max-tokens", "6"]
    assert main(argv) == 0
    assert capsys.readouterr().out == made["said"] + "\n"
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("rendering")["result"] == "not tested"
    assert told == {"target": str(made["gguf"]), "answer": made["said"]}
    assert main(["chat", str(made["base"]), *argv[2:], "--quantization", "q8_0"]) == 0
    assert capsys.readouterr().out != made["said"] + "\n"


def test_a_model_in_ollama(made, tmp_path, capsys):
    with serve(tmp_path) as ollama:
        register_gguf(made["gguf"], "pico", host=ollama.url, question=None)
        words = ["--ollama", "--ollama-host", ollama.url, "--prompt", QUESTION, "--max-tokens", "6"]
        assert main(["chat", "pico", *words]) == 0
        assert capsys.readouterr().out.replace("\ufffd", "") == made["said"] + "\n"
        assert main(["chat", "absent", *words]) == 2
        assert "not found" in capsys.readouterr().err


def test_a_conversation_from_standard_input(made, monkeypatch, capsys):
    lines = ["", QUESTION, "  and then?  ", "/reset", QUESTION, "/bye", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(made["gguf"]), "--max-tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(made["said"] + "\n")
    assert printed.endswith("\n" + made["said"] + "\n")


class Parrot:
    """Says how many messages it was given and the last one; stops when told so."""

    def __init__(self):
        self.seen = []

    def stream(self, messages, max_tokens, temperature, seed):
        self.seen.append([m["content"] for m in messages])
        yield "you said "
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        yield messages[-1]["content"]


def test_what_was_said_is_kept_until_reset_and_a_stopped_answer_was_not_said():
    parrot, shown = Parrot(), []
    lines = iter(["a", "stop", "b", "/reset", "c"])

    def read_line():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(parrot, ChatOptions(system="Be kind."), read_line, shown.append)
    assert parrot.seen == [
        ["Be kind.", "a"],
        ["Be kind.", "a", "you said a", "stop"],
        ["Be kind.", "a", "you said a", "b"],
        ["Be kind.", "c"],
    ]
    forgot = "(the conversation is forgotten)\n"
    assert "".join(shown) == f"you said a\nyou said \nyou said b\n{forgot}you said c\n"


class Narrow(Parrot):
    """Has room for so many words."""

    def __init__(self, room):
        super().__init__()
        self.room, self.seeds = room, []

    def stream(self, messages, max_tokens, temperature, seed):
        if sum(len(m["content"].split()) for m in messages) > self.room:
            raise ContextFullError("the conversation is longer than the context", fix="Ask a shorter question.")
        self.seeds.append((seed, temperature))
        yield from super().stream(messages, max_tokens, temperature, seed)


def talk(lines, room=100, **options):
    narrow, shown = Narrow(room), []
    conversation = Conversation(narrow, ChatOptions(**options), shown.append)
    left = [line for line in lines if not conversation.take(line)]
    return narrow, conversation, "".join(shown), left


def test_a_full_context_drops_the_oldest_turns_and_says_so():
    narrow, conversation, shown, _ = talk(
        ["one", "two", "three", "a question of so many words that it fits nowhere"], room=8
    )
    assert [messages[0] for messages in narrow.seen] == ["one", "one", "two"]
    assert shown.count("the oldest question and its answer were dropped") == 3
    assert "longer than the context: Ask a shorter question." in shown
    assert conversation.turns == [], "each was dropped for the long one, which said why it has no answer"
    assert conversation.take("four")
    assert conversation.turns == [("four", "you said four")], "the conversation goes on"


def test_the_commands_of_a_conversation(tmp_path):
    file = tmp_path / "c.jsonl"
    narrow, conversation, shown, left = talk(
        [
            "/retry",
            "hi",
            "/retry",
            "/system Be brief.",
            "/system",
            "who?",
            f"/save {file}",
            "/help",
            "/nonsense",
            "/bye",
        ],
        seed=3,
    )
    assert left == ["/bye"]
    assert narrow.seeds == [(3, 0.0), (4, 0.7), (3, 0.0)]
    assert narrow.seen == [["hi"], ["hi"], ["Be brief.", "who?"]]
    for said in (
        "no question yet",
        "system message: Be brief.",
        "1 questions and answers",
        "/retry ",
        "no command /nonsense",
    ):
        assert said in shown, said
    assert json.loads(file.read_text()) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "who?"},
            {"role": "assistant", "content": "you said who?"},
        ]
    }
    assert conversation.take(f"/save {tmp_path}")
    assert conversation.turns == [("who?", "you said who?")], "a file that cannot be written loses nothing"


def test_a_short_context_of_llama_cpp_is_survived(made, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([QUESTION] * 12)))
    assert main(["chat", str(made["gguf"]), "--max-tokens", "6", "--context", "64"]) == 0
    assert "the oldest question and its answer were dropped" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal to a single process")
def test_ctrl_c_of_a_terminal_reaches_the_server_too_and_leaves_it_alive(made):
    with LlamaServer(made["gguf"], 512) as server:
        os.kill(server._process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert server.post("/tokenize", {"content": QUESTION})["tokens"]


TALKATIVE = """
import os, socket, threading, types

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (types.SimpleNamespace() for _ in range(3))

class Server:
    def __init__(self, params):
        print("a line on standard output", flush=True)
        os.write(2, b"word " * 100_000 + b"loaded")
        if params.model.path == "bad":
            self.die("no tensors")
        socket_ = socket.create_server(("127.0.0.1", 0))
        self.listening_address = f"http://127.0.0.1:{socket_.getsockname()[1]}"
        threading.Thread(target=lambda: (socket_.accept(), self.die("no room")), daemon=True).start()

    def die(self, words):
        os.write(2, b"word " * 100_000 + words.encode())
        os._exit(9)
"""


@pytest.mark.timeout(60)
def test_a_child_that_says_much_is_not_held_up_and_its_last_words_are_told(tmp_path, monkeypatch):
    """In place of llama.cpp: something that floods both pipes, and dies as it loads or as it answers."""
    (tmp_path / "xllamacpp.py").write_text(TALKATIVE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with LlamaServer("good", 256) as server, pytest.raises(ChatFailedError, match="could not answer") as caught:
        server.post("/tokenize", {})
    assert "ended with status 9" in caught.value.cause
    assert caught.value.cause.endswith("no room")
    with pytest.raises(ChatFailedError, match="cannot load bad") as caught:
        LlamaServer("bad", 256)
    assert caught.value.cause.endswith("no tensors")
    assert len(caught.value.cause) < 1000


def test_what_cannot_be_talked_to(made, tmp_path):
    with pytest.raises(ChatTargetError, match="no file or folder"), open_session(tmp_path / "none"):
        pass
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ChatFailedError), open_session(tmp_path / "text.gguf"):
        pass
    for format in ("gguf-adapter", "ollama-adapter", "mlx"):
        alone = export_adapter(made["lora"], format=format, output=tmp_path / format, ollama_base="pico").path
        with pytest.raises(ChatTargetError, match=r"is an adapter") as told, open_session(alone):
            pass
        assert "./output/lora" in told.value.fix
    with open_session(made["gguf"], context=256) as talk, pytest.raises(ChatFailedError) as caught:
        list(ask_once(talk, "the cat " * 400, SHORT))
    assert "context=8192" in caught.value.fix


def test_without_llama_cpp_it_is_said_before_a_file_is_made(made, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    for argv in (["chat", str(made["lora"])], ["imatrix", str(made["lora"]), "--text", __file__]):
        assert main(argv) == 2
        assert "pip install 'bp-export[verify]'" in capsys.readouterr().err
