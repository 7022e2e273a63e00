"""What the kernels' benchmarks are made of; their figures are in docs/kernels.md."""

import importlib.util
import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import benchmark, chips, tpu_compiler
from pallas_kernels.expert_matmul import bench, gpu, reference, tpu
from support import children


def test_one_table_as_text_and_as_json(tmp_path, monkeypatch, capsys):
    rows = [{"chip": "v5p", "share": 0.98123}, {"chip": "v6e", "rival": 12}]
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(path), "--chips", "v5p,v6e"])
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    benchmark.main("", lambda names: [row for row in rows if row["chip"] in names], list)
    assert capsys.readouterr().out.splitlines() == [
        "chip  share  rival",
        "v5p   0.981  -",
        "v6e   -      12",
    ]
    assert json.loads(path.read_text()) == rows


def test_what_fails_in_a_subprocess_is_none_and_says_why(capfd):
    assert benchmark.in_subprocess(divmod, 7, 2) == (3, 1)
    assert benchmark.in_subprocess(divmod, 7, 0) is None
    assert benchmark.in_subprocess(os._exit, 1) is None
    assert benchmark.in_subprocess(children.end_as_libtpu_does) is None
    out, err = capfd.readouterr()
    first, *others = out.splitlines()
    assert "zero" in first and others == [
        "(1,): the process crashed",
        "(): the process crashed: Check failed: the reason",
    ]
    assert not err


def test_median_ms_is_a_time():
    assert 0 < benchmark.median_ms(lambda x: x + 1, [jnp.ones(4)], num_runs=3) < 1e3
    assert benchmark.rival_ms("absent", lambda x: x @ x, [jnp.ones((2, 3))]) is None


@pytest.mark.parametrize("layout", [tpu, gpu])
def test_the_problems_fit_the_operations(layout, monkeypatch):
    # The reference stands in for the kernels; what is checked is that shapes and arguments are
    # those of the operations.
    for name in ("gate_up", "matmul", "gated_gradient", "input_gradient", "weight_gradient"):
        monkeypatch.setattr(layout, name, getattr(reference, name))
    columns = {}
    for name, (fn, shapes, _, width) in bench._operations(layout, 128, {}).items():
        columns[name] = jax.tree.leaves(jax.eval_shape(fn, *shapes))[0].shape[-1]
        assert width in (6400, 18304)
    assert columns == dict.fromkeys(columns, 128) and len(columns) == 6


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("TPU v4", "v4", 275e12),  # jax shows a v4 chip as one device
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5e", "v5e", 197e12),
        ("TPU v5p", "v5p", 459e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU7x", "tpu7x", 1153.5e12),  # and a tpu7x chip as two
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H100 PCIe", "h100 pcie", 756e12),
        ("NVIDIA H100 NVL", "h100 nvl", 835e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA H200 NVL", "h200 nvl", 835e12),
        ("NVIDIA GH200 480GB", "gh200", 989e12),
    ],
)
def test_chips_are_found_by_the_name_jax_gives_them(kind, name, peak):
    assert chips.of_device(kind).name == name
    assert chips.peak_flops(kind) == peak


def test_what_is_not_in_the_table_has_no_peak():
    assert chips.of_device("cpu") is None and chips.peak_flops("cpu") is None


def test_off_tpus_the_train_step_has_no_options():
    assert tpu_compiler.train_step_options(jax.devices()[0]) == {}
    assert tpu_compiler.train_step_options(None) == {}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)
def test_static_cycles_of_a_product_are_near_the_peak():
    num_cycles = benchmark.in_subprocess(children.cycles_of_a_product)
    ideal = 2 * 1024**2 * 2048 / (chips.CHIPS["v5p"].peak_flops / chips.CHIPS["v5p"].clock_hz)
    assert 0.5 < ideal / num_cycles < 1.0
