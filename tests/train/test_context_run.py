"""Runs with `config.mesh.context`: training, validation, adapters, checkpoints as on one chip."""

import dataclasses
import json

import pytest

from hunyuan_jax.config import LoraConfig, MeshConfig
from hunyuan_jax.train import loop
from support.runs import config_for, on_one_device, write_corpus


def losses(workdir):
    """By (kind, step), in the order of a run."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {
        (name, row["step"]): row[name]
        for row in map(json.loads, lines)
        for name in ("loss", "validation_loss")
        if name in row
    }


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_on_several_chips_a_row_goes_on_with_one(rank, tmp_path):
    (tmp_path / "text").mkdir()
    config = config_for(write_corpus(tmp_path / "text"), num_steps=3, batch_size=4, eval_every=2)
    model = dataclasses.replace(
        config.model,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        moe=dataclasses.replace(config.model.moe, group_size=4),
        lora=LoraConfig(rank=rank),
    )
    config = dataclasses.replace(config, model=model)
    schedule = dataclasses.replace(config.schedule, num_steps=4)
    config = dataclasses.replace(config, schedule=schedule)
    spread = dataclasses.replace(config, mesh=MeshConfig(data=2, context=4))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=4))
    loop.run(spread, str(tmp_path / "spread"))
    with on_one_device():
        loop.run(longer, str(tmp_path / "alone"))
        loop.run(longer, str(tmp_path / "spread"))
    expected, found = losses(tmp_path / "alone"), losses(tmp_path / "spread")
    assert len(expected) == 6 and set(expected) <= set(found)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
