"""Renamed private methods of transformers change nothing, or end a run with a code: never a run without checkpoints."""

import pytest
from renamed import ENGINES, train_all, train_apart

NAMES = ("_maybe_log_save_evaluate", "_save_checkpoint", "_get_train_sampler")


@pytest.fixture(scope="module")
def results(pico_model, tmp_path_factory):
    """(with every name renamed, as installed)"""
    folder = tmp_path_factory.mktemp("renamed")
    data = folder / "chats.jsonl"
    turn = '{"conversations": [{"from": "human", "value": "who are you %d"}, {"from": "gpt", "value": "marlow %d"}]}\n'
    data.write_text("".join(turn % (i, i) for i in range(8)))
    return train_apart(pico_model, data, folder, NAMES), train_all(pico_model, data, folder / "installed")


@pytest.mark.parametrize("engine", ENGINES)
def test_renamed_methods_change_nothing(results, engine):
    renamed, installed = results
    assert "copy" in renamed["trainer"]
    assert installed[engine]["saved"] == [2, 4]
    assert len(installed[engine]["losses"]) == 5
    assert renamed[engine] == installed[engine]
