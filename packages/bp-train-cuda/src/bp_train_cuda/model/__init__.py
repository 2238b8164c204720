"""What a loaded model is made of: its output head, how it takes packed examples, its experts.

Reading starts at `head` (hidden states to logits), then `packing` (examples in one sequence kept apart) and `experts`
(what an adapter reaches in a mixture of experts). `pico` builds a small random model of a config's class for proofs.
"""
