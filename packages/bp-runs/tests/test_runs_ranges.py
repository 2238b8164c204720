"""Ranges and choices stand with a setting's field and hold wherever settings are made."""

import re
from dataclasses import fields, replace
from typing import get_type_hints

import pytest

from bp_runs.errors import InvalidSettingError
from bp_runs.spec import RunFolders, Settings, TrainingSpec, TrainSpec, choices_of

GROUPS = {group.name: get_type_hints(Settings)[group.name] for group in fields(Settings)}
FIELDS = [(name, f, get_type_hints(spec)[f.name]) for name, spec in GROUPS.items() for f in fields(spec)]
NAN = float("nan")


def with_value(settings, group, name, value):
    return replace(settings, **{group: replace(getattr(settings, group), **{name: value})})


def wrong_values(allowed):
    yield NAN
    if allowed.above is not None:
        yield from (allowed.above, float("inf"))
    if allowed.at_least is not None:
        yield allowed.at_least - 1
    if allowed.at_most is not None:
        yield allowed.at_most + 1


WRONG = [
    (group, f.name, value)
    for group, f, _ in FIELDS
    if f.metadata["range"]
    for value in wrong_values(f.metadata["range"])
] + [(group, f.name, "no such choice") for group, f, kind in FIELDS if choices_of(kind)]


@pytest.mark.parametrize(("group", "name", "value"), WRONG)
def test_a_value_outside_is_rejected_by_the_settings_themselves(group, name, value):
    with pytest.raises(InvalidSettingError) as caught:
        with_value(Settings(), group, name, value)
    assert caught.value.setting == f"{group}.{name}"
    assert re.match(rf"(invalid value for )?{group}\.{name}\b", caught.value.message)


def test_the_ends_of_every_range_and_every_choice_are_taken():
    for group, f, kind in FIELDS:
        allowed = f.metadata["range"]
        ends = [end for end in (allowed.at_least, allowed.at_most) if end is not None] if allowed else []
        for value in (*ends, *choices_of(kind)):
            assert getattr(getattr(with_value(Settings(), group, f.name, value), group), f.name) == value


def test_a_rail_s_own_spec_is_held_to_them_too(tmp_path):
    spec = TrainSpec.build(Settings(), RunFolders(run_id="1", output=tmp_path, run=tmp_path), tmp_path)
    with pytest.raises(InvalidSettingError, match=r"lora\.r is 0; it must be at least 1"):
        replace(spec, lora=replace(spec.lora, r=0))


def test_steps_and_epochs_are_not_both_set():
    with pytest.raises(InvalidSettingError, match="both say how long to train"):
        Settings(training=TrainingSpec(steps=5, epochs=2.0))
