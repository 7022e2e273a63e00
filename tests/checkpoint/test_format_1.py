"""Workdirs of format 1, whose checkpoints hold parameters and optimizer in one item `state`: they
continue, are loaded, and get checkpoints of the present format.

tests/golden/format_1 was written by commit b4e1fc7 with jax 0.10.2 on an x86-64 CPU: three steps
of `config()` with the text of `corpus`, stopped by SIGTERM.  LOSSES are those of its own next
steps.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from hunyuan_jax import from_pretrained
from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from hunyuan_jax.parallel import mesh
from hunyuan_jax.train import loop
from support import paths

LOSSES = [5.364557266235352, 5.332648277282715, 5.311208248138428]
# They were equal bit for bit with the versions of the record; other compilers and CPUs round
# differently.
TOLERANCE = 1e-5


def config():
    model = ModelConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position=32,
        cla_share_factor=2,
        pad_token_id=258,
        bos_token_id=256,
        eos_token_ids=(257,),
        moe=MoeConfig(num_experts=2, num_shared_experts=1, dispatch="recycle"),
    )
    return Config(
        model=model,
        mesh=MeshConfig(),
        data=DataConfig(source="text"),
        optimizer=OptimizerConfig(state_dtype="fp8_lm"),
        schedule=ScheduleConfig(peak_lr=3e-3, warmup_steps=2),
        train=TrainConfig(
            num_steps=6, batch_size=2, seq_len=32, log_every=1, eval_every=1000, eval_batches=1
        ),
        checkpoint=CheckpointConfig(every=3, keep=1),
    )


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A copy of the recorded workdir beside its text, which its config names relatively."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "make_mesh", lambda _: mesh.single_device_mesh())
    (tmp_path / "text").mkdir()
    for i in range(4):
        lines = (f"line {j} of file {i}: abcabcabc\n" for j in range(20))
        (tmp_path / "text" / f"{i}.txt").write_text("".join(lines))
    return shutil.copytree(paths.GOLDEN / "format_1", tmp_path / "run")


@pytest.mark.heavy
def test_a_run_of_format_1_continues_with_its_own_losses(workdir):
    read = from_pretrained(workdir)
    recorded = json.loads((workdir / "checkpoints" / "3" / "manifest.json").read_text())
    assert "format" not in recorded and (workdir / "checkpoints" / "3" / "state").is_dir()
    assert loop.run(config(), workdir) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(found) == [4, 5, 6]
    np.testing.assert_allclose(list(found.values()), LOSSES, rtol=TOLERANCE)

    newest = workdir / "checkpoints" / "6"
    assert manifest.read(newest)["format"] == manifest.FORMAT == 2
    assert {path.name for path in newest.iterdir() if path.is_dir()} == {
        "params",
        "optimizer",
        "run",
    }
    trained = from_pretrained(workdir)
    for before, after in zip(
        jax.tree.leaves(read.params), jax.tree.leaves(trained.params), strict=True
    ):
        difference = np.abs(np.asarray(before) - np.asarray(after)).max()
        assert before.dtype == after.dtype and 0 < difference < 0.05  # three small steps later
