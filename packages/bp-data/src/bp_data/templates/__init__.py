"""Chat templates: the one engine that renders them, for training, export, parity, chat and Ollama.

    reader.py         the template files of a model folder, and its special tokens
    engine.py         Jinja as transformers sets it up; reading starts at `ChatTemplate.render`
    end_of_turn.py    which token ends an assistant's turn
    conversations.py  ten conversations, and the hashes by which two renderings are compared

Nothing here loads a tokenizer, so that an exporter can use it without the tokenizers package.
"""
