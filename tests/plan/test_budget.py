"""The compiled train step of a small a52b must not get larger or slower, or talk more, unnoticed:
peak memory, estimated cycles and collectives against budget.json, for three TPU generations, two
of them with `-m slow`.

After a change that is meant: `python tests/test_budget.py` records anew; look at the difference
before committing it.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

from hunyuan_jax import presets
from hunyuan_jax.config import Config, MeshConfig, TrainConfig
from hunyuan_jax.plan import aot

RECORD = Path(__file__).with_name("budget.json")
TOPOLOGIES = ("v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")  # eight devices each
SLACK = 1.03
SMALL_BYTES = 2**16  # gradients of norms and the router; those of matrices are reduce-scattered

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)


def small_a52b():
    """Two CLA groups with the proportions of a52b: heads of 80, F no whole tiles when split, one
    shared expert; one block of attention.
    """
    model = dataclasses.replace(
        presets.a52b(),
        vocab_size=2048,
        hidden_size=640,
        intermediate_size=2032,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        moe=dataclasses.replace(presets.a52b().moe, num_experts=2),
        pad_token_id=-1,
        eos_token_ids=(),
    )
    return Config(
        model, mesh=MeshConfig(data=4, expert=2), train=TrainConfig(batch_size=8, seq_len=128)
    )


def measure(topology):
    """{peak_bytes, cycles, ...}: the collectives as sorted "kind axes region" lines."""
    report = aot.report(small_a52b(), topology)
    collectives = {f"{c.kind} {' x '.join(c.axes)} {c.region}" for c in report.hlo.collectives}
    over_data = [
        c.bytes for c in report.hlo.collectives if c.kind == "all-reduce" and "data" in c.axes
    ]
    return {
        "peak_bytes": report.memory.peak,
        "cycles": report.hlo.cycles,
        "collectives": sorted(collectives),
        "largest_all_reduce_over_data": max(over_data, default=0),
    }


@pytest.mark.parametrize(
    "topology",
    [TOPOLOGIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TOPOLOGIES[1:])],
)
def test_the_step_stays_within_its_budget(topology):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    version = importlib.metadata.version("libtpu")
    if version != record["libtpu"]:
        pytest.skip(
            f"recorded with libtpu {record['libtpu']}, this is {version}: another compiler, other "
            "figures"
        )
    budget, found = record[topology], measure(topology)
    assert found["peak_bytes"] <= SLACK * budget["peak_bytes"]
    assert found["cycles"] <= SLACK * budget["cycles"]
    assert set(found["collectives"]) <= set(budget["collectives"])
    assert found["largest_all_reduce_over_data"] <= SMALL_BYTES


if __name__ == "__main__":
    figures = {
        "libtpu": importlib.metadata.version("libtpu"),
        **{topology: measure(topology) for topology in TOPOLOGIES},
    }
    RECORD.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
