"""Renamed private methods of transformers change nothing: never again a run that ends well without checkpoints."""

import pytest
from renamed import train_apart, train_here

NAMES = ("_maybe_log_save_evaluate", "_save_checkpoint", "_get_train_sampler")


@pytest.mark.parametrize("engine", ["native", pytest.param("trl", marks=pytest.mark.slow)])
def test_renamed_methods_change_nothing(pico_model, chat_file, tmp_path, engine):
    renamed = train_apart(pico_model, chat_file, tmp_path / "renamed", engine, NAMES)
    installed = train_here(pico_model, chat_file, tmp_path / "installed", engine)
    assert "copy" in renamed.pop("trainer")
    assert installed["saved"] == [2, 4]
    assert len(installed["losses"]) == 5
    assert renamed == installed
