"""A reader who steps into a training run meets few functions on the way to the loss."""

import traceback

from backpropagate import Trainer
from bp_train_cuda.engines import framework

MOST = 12
"""From the command's function to the one that computes the loss; transformers' Trainer took 24."""


def test_the_loss_is_at_most_twelve_frames_below_the_command(pico_model, chat_file, tmp_path, monkeypatch):
    stacks, loss = [], framework.sft_loss

    def noted(log_probs):
        stacks.append([frame.name for frame in traceback.extract_stack()][:-1])
        return loss(log_probs)

    monkeypatch.setattr(framework, "sft_loss", noted)
    Trainer(str(pico_model), output=tmp_path, report_to="none").train(chat_file, steps=1)
    below = stacks[0][len(stacks[0]) - stacks[0][::-1].index("run_loop") - 1 :]
    assert below == ["run_loop", "split", "accumulate", "backward", "_loss"]
    own = [name for name in stacks[0] if name != "test_the_loss_is_at_most_twelve_frames_below_the_command"]
    first = len(own) - 1 - own[::-1].index("_train") - 1  # Trainer.train, before Trainer._train
    assert own[first] == "train"
    assert 1 + len(own[first:]) <= MOST, own[first:]  # and the command's function, which calls Trainer.train
