"""Chat with an adapter, a model folder, a GGUF or a model in Ollama; llama.cpp runs in a process of its own."""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export.chat.conversation import converse
    from bp_export.chat.llama import LlamaChat
    from bp_export.chat.session import ChatOptions, ChatSession, OllamaSession, ask_once, open_session

__all__ = [
    "ChatOptions",
    "ChatSession",
    "LlamaChat",
    "OllamaSession",
    "ask_once",
    "converse",
    "open_session",
]

_MODULES = {
    "LlamaChat": "llama",
    "ChatOptions": "session",
    "ChatSession": "session",
    "OllamaSession": "session",
    "ask_once": "session",
    "converse": "conversation",
    "open_session": "session",
}
__getattr__ = load_lazily(__name__, _MODULES)
