"""The witness file: what is written is read again, and what does not belong together is not believed."""

import json

import pytest

from bp_runs.errors import AdapterInvalidError
from bp_runs.witness import WITNESS_FILE, BaseFacts, Witness, WitnessPrompt, hash_ids, read_witness, write_witness

PROMPT = WitnessPrompt(
    kind="validation",
    ids=(5, 6, 7, 8),
    places=(1, 3),
    tokens=((7, 9), (2, 4)),
    logprobs=((-0.25, -1.5), (-0.125, -3.0)),
    base_logprobs=((-0.5, -1.0), (-2.0, -0.75)),
)
WITNESS = Witness(
    run_id="20260101-000000-abcdef",
    base=BaseFacts(
        mode="qlora", dtype="bfloat16", packed=("model.layers.0.mlp.up_proj.weight",), double_quantized=True
    ),
    prompts=(PROMPT,),
)


def write(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    write_witness(folder, WITNESS, weights=folder / "adapter_model.safetensors")
    return folder / WITNESS_FILE


def test_what_is_written_is_read_again(tmp_path):
    write(tmp_path)
    found = read_witness(tmp_path)
    assert (found.prompts, found.base, found.run_id) == (WITNESS.prompts, WITNESS.base, WITNESS.run_id)
    assert found.place_count == 2
    assert found.prompts[0].sha256 == hash_ids([5, 6, 7, 8])
    assert read_witness(tmp_path.parent) is None


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda found: found["prompts"][0]["ids"].append(1), "hash differs"),
        (lambda found: found["prompts"][0]["places"].append(2), "differ in number"),
        (lambda found: found["prompts"][0]["logprobs"][0].pop(), "differ in number"),
        (lambda found: found["prompts"][0].update(places=[1, 9]), "outside its prompt"),
        (lambda found: found.update(schema="backpropagate.witness/9"), "witness/9"),
        (lambda found: found.pop("base"), "base"),
    ],
)
def test_damage_is_noticed(tmp_path, damage, word):
    file = write(tmp_path)
    found = json.loads(file.read_bytes())
    damage(found)
    file.write_text(json.dumps(found))
    with pytest.raises(AdapterInvalidError) as caught:
        read_witness(tmp_path)
    assert word in f"{caught.value.message} {caught.value.cause}"


def test_a_witness_of_other_weights_is_not_believed(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"trained further")
    with pytest.raises(AdapterInvalidError, match="other weights"):
        read_witness(tmp_path)
