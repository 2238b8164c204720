"""A tiny byte-level tokenizer, trained here, and chat templates written after the manner of known families."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The capital of France is Paris. The capital of Germany is Berlin.",
    "user assistant system tool Hello there, how are you today? I am fine, thank you.",
    "One\n\nTwo\n\n\n\nThree\n\n\nFour",
    "😀 😃 naïve café — “quoted” … 你好，世界",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{%- if messages[0].role != 'system' %}\n"
    "    {{- '<|im_start|>system\\nYou are a helpful assistant.' }}\n"
    "{%- else %}{{- '<|im_start|>system\\n' + messages[0].content }}{%- endif %}\n"
    "{%- if tools %}{{- '\\n<tools>' }}{%- for t in tools %}{{- '\\n' }}{{- t | tojson }}{%- endfor %}{{- '\\n</tools>' }}{%- endif %}\n"
    "{{- '<|im_end|>\\n' }}\n"
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'tool' %}\n"
    "        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}\n"
    "    {%- elif m.role == 'assistant' and m.tool_calls %}\n"
    "        {{- '<|im_start|>assistant' }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}\n"
    "        {%- for c in m.tool_calls %}{{- '\\n<tool_call>\\n' }}{{- c.function | tojson }}{{- '\\n</tool_call>' }}{%- endfor %}\n"
    "        {{- '<|im_end|>\\n' }}\n"
    "    {%- elif not (m.role == 'system' and loop.first) %}\n"
    "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# The system prompt stands in the last user turn, so that renderings of a part are no prefixes of the whole.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in turns %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
    "{%- if m.role == 'user' %}"
    "{%- if loop.last and system is defined or loop.index == turns | length - 1 and system is defined %}"
    "{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)
# <|end|> takes the blanks after it, and an end-of-text token closes the whole.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Reasoning of earlier turns is dropped, and the last turn gets an empty one.
REASONER = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- set words = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- words }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "phi": ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
}
SPECIALS["phi3"] = SPECIALS["phi"]  # the same tokens, which leave the blanks beside them alone
NAMES = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "lstrip": False},
    },
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "phi": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}

NAMES["phi3"] = NAMES["phi"]

# The originals of public models, each with the family whose special tokens it uses; see templates/README.md.
PUBLIC = {
    "mistral-7b-instruct-v0.3": "mistral",
    "phi-4-mini-instruct": "phi3",
    "smollm2-instruct": "chatml",
    "smollm3-3b": "chatml",
}


def read_template(name):
    """The text of a public model's chat template."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def train_core(specials, *, greedy=False):
    """A byte-level BPE with every byte and the given special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokens = [AddedToken(text, special=True, normalized=False, rstrip=greedy) for text in specials]
    trainer = trainers.BpeTrainer(
        vocab_size=480, show_progress=False, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def write_model(folder, family, template=None, **config):
    """A model folder with a tokenizer and, if given, a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    core = train_core(SPECIALS[family], greedy=family == "phi")
    core.save(str(folder / "tokenizer.json"))
    data = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES[family], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(data), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """``model(family, template)``: a model folder, made once."""
    made = {}

    def make(family, template=None):
        if (family, template) not in made:
            made[family, template] = write_model(tmp_path_factory.mktemp(family), family, template)
        return made[family, template]

    return make


@pytest.fixture
def write_lines(tmp_path):
    """``write_lines(rows)``: a .jsonl file of them."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
