"""The model: loading, adapters, log-probabilities, packing.

load.py        the base from a Hugging Face or mlx-community folder
lora.py        LoRA and DoRA on its linear layers, under PEFT's names
log_probs.py   log-probabilities of trained tokens, without ever holding the logits of a batch
packing.py     packed examples, and the proof that they stay apart
save.py        the adapter or model folder that comes out
"""
