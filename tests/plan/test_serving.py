"""plan --serve: what a server's programs need and could reach; with libtpu, a real one."""

import json
import sys

import jax
import pytest

from hunyuan_jax import cli, presets
from hunyuan_jax.config import MeshConfig, MoeConfig, SparkConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.plan import hlo, hlo_text, serving, topology
from hunyuan_jax.quant.array import QuantArray, product
from hunyuan_jax.weights import few_bits, names
from pallas_kernels import tpu_compiler
from pallas_kernels.chips import CHIPS
from support import paths
from support.folders import random_params, small

# ml_collections loads recipes in a way that newer Pythons deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

TINY = f"--config={paths.ROOT / 'configs/tiny.py'}"


@pytest.fixture
def plan(monkeypatch):
    """Runs the command in this process."""

    def run(*options):
        arguments = ["plan", TINY, "--serve", *options]
        monkeypatch.setattr(sys, "argv", ["hunyuan_jax", *arguments])
        return cli.run(arguments)

    return run


@pytest.mark.parametrize(
    ("num_devices", "sizes"), [(4, (1, 1, 4)), (16, (1, 2, 8)), (256, (2, 16, 8))]
)
def test_kv_heads_are_split_first_then_experts_then_rows(num_devices, sizes):
    mesh = serving.mesh_of(presets.a52b(), num_devices)
    assert (mesh.data, mesh.expert, mesh.tensor) == sizes


@pytest.mark.parametrize("method", [None, "int8", "int4", "fp8"])
def test_abstract_parameters_are_those_that_are_read(method):
    cfg = small(num_layers=2, moe=MoeConfig(num_experts=2, top_k=1))
    specs, params = abstract_model(cfg, single_device_mesh())[1], random_params(cfg)
    read = few_bits.read(
        names.entries(cfg),
        cfg.dtype,
        specs,
        method or few_bits.NUMBERS,
        few_bits.of_params(params),
        lambda entry: None,
    )
    abstract = few_bits.abstract(cfg, specs, method)
    assert jax.tree.structure(read) == jax.tree.structure(abstract)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(abstract), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_an_expert_that_no_token_chooses_is_not_read():
    cfg = small(num_layers=2, moe=MoeConfig(num_experts=4, top_k=1), dtype="float32")
    specs, counts = abstract_model(cfg, single_device_mesh())[1], count(cfg)
    params = few_bits.abstract(cfg, specs, None)
    table = 0 if cfg.tie_embeddings else counts.embedding
    for batch, share in ((1, 1 / 4), (2, 7 / 16)):
        read = counts.total - table - (1 - share) * counts.experts
        cache = batch * serving.CONTEXT * counts.kv_bytes_per_token
        assert serving.touched_bytes(cfg, specs, params, batch) == 4 * read + cache
    quantized = few_bits.abstract(cfg, specs, "int8")
    assert serving.touched_bytes(cfg, specs, quantized, 1) < serving.touched_bytes(
        cfg, specs, params, 1
    )


def test_the_bound_is_that_of_the_memory_or_of_the_peak():
    cfg, chip = presets.a52b(), CHIPS["v6e"]
    assert serving.bound(cfg, chip, 16, 1, 10**9) == 16 * chip.hbm_bytes_per_s / 10**9
    most = 16 * chip.peak_flops / (2 * count(cfg).active)
    assert serving.bound(cfg, chip, 16, 64, 1) == pytest.approx(most)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--serve needs --topology"),
        (("--topology=v5e:2x2", "--search"), "--search is about training"),
        (("--fit", "--mesh=tensor:4"), "--fit chooses the mesh"),
        (("--topology=v5e:2x2", "--mesh=four:4"), "is not AXIS:SIZE"),
    ],
)
def test_what_the_command_refuses(plan, options, message):
    with pytest.raises(ConfigError, match=message):
        plan(*options)


def test_options_of_serving_are_refused_without_it(monkeypatch):
    arguments = ["plan", TINY, "--topology=v5e:2x2", "--max_rows=4"]
    monkeypatch.setattr(sys, "argv", ["hunyuan_jax", *arguments])
    with pytest.raises(ConfigError, match="--max_rows acts with --serve only"):
        cli.run(arguments)


def test_fit_takes_only_a_slice_that_is_too_small_for_one():
    cfg = small(num_layers=2, moe=MoeConfig(), spark=SparkConfig(neuron_share=0.08))
    with pytest.raises(ConfigError, match="layers of Spark are not quantised"):
        serving.smallest(cfg, "v5e", Limits(), "int8")


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is not installed: '.[tpu]'")
@pytest.mark.parametrize(
    ("chips", "method", "products", "sizes"),
    [
        ("v5e:2x2", None, None, {"expert": 4}),
        pytest.param("v5e:2x2", None, None, {"context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("v5e:2x2", "w8a8", "s8 x s8", {"expert": 4}, marks=pytest.mark.slow),
        pytest.param(
            "tpu7x:2x2x1",
            "w8a8-fp8",
            "f8e4m3fn x f8e4m3fn",
            {"data": 2, "expert": 4},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
@pytest.mark.heavy
def test_a_server_of_a_tiny_model_on_four_chips(plan, capsys, chips, method, products, sizes):
    mesh = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
    options = (f"--topology={chips}", "--max_context=256", "--max_rows=8", f"--mesh={mesh}")
    options += (f"--quantize={method}",) if method else ()
    assert plan(*options, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["mesh"] == sizes
    assert [program["name"] for program in found["programs"]] == ["decode", "chunk"]
    assert 0 < found["weights"] < found["hbm"] and found["num_tokens"] > 256
    for program in found["programs"]:  # new tokens are written in place: no copy of the cache
        assert program["kernels"]["append"] and program["temporaries"] < 0.1 * found["hbm"]
        # The four projections and the three products of experts: the compiler widens none.
        assert products is None or program["products"][products] >= 7
    programs = tuple(serving.Program(**program) for program in found.pop("programs"))
    serving.print_report(serving.Report(**found, programs=programs))
    assert "tokens of context fit" in capsys.readouterr().out


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is not installed: '.[tpu]'")
@pytest.mark.parametrize(
    ("chips", "dtype"),
    [("v5e:2x2", "int8"), ("v6e:2x2", "int8"), ("tpu7x:2x2x1", "float8_e4m3fn")],
)
def test_rounded_rows_are_multiplied_in_eight_bits(chips, dtype):
    """At the width of Hunyuan-Large's queries."""
    sharding = jax.sharding.SingleDeviceSharding(topology.topology_devices(chips)[0])

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    values, scale = abstract((6400, 80, 80), dtype), abstract((1, 80, 80), "float32")
    w = QuantArray(values, scale, None, num_out=2, rounds_inputs=True)
    with tpu_compiler.without_cache():
        compiled = jax.jit(product).lower(abstract((16, 6400), "bfloat16"), w).compile()
    name = {"int8": "s8"}.get(dtype, "f8e4m3fn")
    assert hlo.product_dtypes(hlo_text.parse(compiled.as_text())) == {f"{name} x {name}": 1}


def test_the_mesh_of_a_server_keeps_every_device():
    assert serving.mesh_of(presets.tiny(), 4) == MeshConfig(data=1, expert=2, tensor=2)
