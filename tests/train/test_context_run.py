"""Runs with `config.mesh.context`: training, validation, adapters, checkpoints as on one chip."""

import dataclasses
import json

import pytest

from hunyuan_jax.config import LoraConfig, MeshConfig
from hunyuan_jax.train import loop
from support.runs import config_for, on_one_device, write_corpus


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row.get("loss", row.get("validation_loss")) for row in rows if "step" in row]


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_several_chips_a_row_goes_on_with_one(rank, tmp_path):
    (tmp_path / "text").mkdir()
    config = config_for(write_corpus(tmp_path / "text"), num_steps=3, batch_size=4, eval_every=2)
    model = dataclasses.replace(
        config.model,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        moe=dataclasses.replace(config.model.moe, group_size=8),
        lora=LoraConfig(rank=rank),
    )
    config = dataclasses.replace(config, model=model)
    schedule = dataclasses.replace(config.schedule, num_steps=4)
    config = dataclasses.replace(config, schedule=schedule)
    spread = dataclasses.replace(config, mesh=MeshConfig(data=2, context=2, tensor=2))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=4))
    loop.run(spread, str(tmp_path / "spread"))
    with on_one_device():
        loop.run(longer, str(tmp_path / "alone"))
        loop.run(longer, str(tmp_path / "spread"))
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
