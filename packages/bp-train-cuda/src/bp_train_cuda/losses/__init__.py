"""One loss per method, as pure functions of log-probabilities; the papers' equations are in their docstrings.

log_probs.py    log-probabilities of trained tokens, without ever holding the logits of a batch
sft.py          supervised fine-tuning: cross-entropy
preference.py   dpo, orpo, simpo and kto: one loss per example from the log-probabilities of its completions
"""
