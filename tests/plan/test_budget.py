"""A change must not make the compiled train step of a small a52b larger or slower, or add traffic,
unnoticed.

Peak memory, estimated cycles and collectives are compared with budget.json, for three TPU
generations (two of them with `-m slow`).  The figures are the compiler's, so budget.json has a
record for each libtpu version.  A version without a record is reported at the end of the run.

To record the installed version, after a change that is meant or with a new libtpu:

    python tests/plan/test_budget.py

Look at the difference before committing it.
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
    reason="NOT CHECKED: the budget of the compiled train step, since libtpu is not installed "
    "(pip install '.[tpu]')",
)


def small_a52b():
    """a52b in small: two CLA groups, heads of 80, a shared expert, and an F whose shards are not a
    multiple of the TPU's tile.
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
    """Returns the figures of one topology as budget.json holds them.

    A collective is "kind axes region".
    """
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
        # What the SparseCore computes has no cycles: it would hold up the transfers behind it.
        "num_unknown_cycles": report.hlo.num_unknown_cycles,
    }


@pytest.mark.parametrize(
    "topology",
    [TOPOLOGIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TOPOLOGIES[1:])],
)
@pytest.mark.heavy
def test_the_step_stays_within_its_budget(topology):
    records = json.loads(RECORD.read_text(encoding="utf-8"))
    version = importlib.metadata.version("libtpu")
    found = measure(topology)
    assert found["largest_all_reduce_over_data"] <= SMALL_BYTES  # with any compiler
    assert found["num_unknown_cycles"] == 0
    if version not in records:
        pytest.skip(
            f"NOT CHECKED: peak memory, cycles and collectives of {topology}. libtpu "
            f"{version} has "
            f"no record in {RECORD.name}, which has {', '.join(records)}; to add one, run: "
            "python tests/plan/test_budget.py"
        )
    budget = records[version][topology]
    assert found["peak_bytes"] <= SLACK * budget["peak_bytes"]
    assert found["cycles"] <= SLACK * budget["cycles"]
    assert set(found["collectives"]) <= set(budget["collectives"])


if __name__ == "__main__":
    records = json.loads(RECORD.read_text(encoding="utf-8"))
    records[importlib.metadata.version("libtpu")] = {
        topology: measure(topology) for topology in TOPOLOGIES
    }
    RECORD.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
