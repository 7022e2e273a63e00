"""plan: the HLO reader on small texts, the line items, the command's errors; with libtpu, real
plans of a tiny model.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys

import jax
import pytest

from hunyuan_jax import cli, presets
from hunyuan_jax.config import (
    Config,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers.mixer.context_facts import Form
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.plan import (
    aot,
    hlo,
    hlo_text,
    memory,
    replica_groups,
    search,
    show,
    timeline,
    topology,
)
from hunyuan_jax.train.state import abstract_model
from hunyuan_jax.weights.open import open_model
from pallas_kernels.chips import CHIPS
from support import paths, recipes

# ml_collections loads recipes in a way that newer Pythons deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

MESH = {"replica": 1, "data": 2, "expert": 4, "tensor": 1}
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu]'",
)
TINY = f"--config={paths.ROOT / 'configs/tiny.py'}"


@pytest.fixture
def plan(monkeypatch):
    """Runs the command in this process."""

    def run(*options):
        arguments = ["plan", TINY, *options]
        # where ml_collections looks for overrides
        monkeypatch.setattr(sys, "argv", ["hunyuan_jax", *arguments])
        return cli.run(arguments)

    return run


def cycles(n):
    return f'backend_config={{"flag_configs":[],"estimated_cycles":"{n}"}}'


HEADER = 'HloModule jit_step, is_scheduled=true\n\nFileNames\n1 "a.py"\n\n'


def loop(name, trips, body, extra=""):
    """A body and a condition as jax's scans compile to: count up to a constant."""
    return f"""%cond_{name} (p.1: (s32[], f32[4])) -> pred[] {{
  %limit.{name} = s32[]{{:T(128)}} constant({trips})
  %other.{name} = s32[] constant(7)
  %p.1 = (s32[], f32[4]) parameter(0)
  %i.{name} = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt.{name} = pred[] compare(%i.{name}, %limit.{name}), direction=LT
}}

%body_{name} (p.2: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p.2 = (s32[], f32[4]{{0:T(128)}}) parameter(0)
{body}  ROOT %t.{name} = (s32[], f32[4]) tuple(%p.2, %p.2)
}}{extra}

"""


def while_op(name, op_name):
    return (
        f"  %while.{name} = (s32[], f32[4]{{0:T(8,128)(2,1)}}) while(%p.0), "
        f"condition=%cond_{name}, body=%body_{name}, "
        f'metadata={{op_name="{op_name}"}}\n'
    )


def entry(body):
    return (
        f"ENTRY %main (p.0: f32[4]) -> f32[4] {{\n  %p.0 = f32[4]{{0}} parameter(0)\n"
        f"{body}  ROOT %r.0 = f32[4]{{0}} copy(%p.0)\n}}\n"
    )


def fusion(name, n, operand="%p.0", shape="f32[4]{0:T(128)}"):
    return f"  %fusion.{name} = {shape} fusion({operand}), kind=kLoop, calls=%fused, {cycles(n)}\n"


FUSED = (
    "%fused (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n  ROOT %n.1 = f32[4]{0} "
    "negate(%a), " + cycles(999) + "\n}\n\n"
)


def analyse(text, **options):
    return hlo.analyse(hlo_text.parse(text), MESH, **options)


def by_region(text):
    return {region.name: (region.times, region.cycles) for region in analyse(text).regions}


def test_trip_counts_apply_in_nested_loops_and_calls():
    inner = loop("inner", 5, fusion("in", 10, "%p.2"))
    forward = loop(
        "fwd", 3, fusion("f", 100, "%p.2") + while_op("inner", "jit(step)/jvp()/while/body/while")
    )
    backward = loop(
        "bwd",
        2,
        fusion("b", 1000, "%p.2") + "  %call.1 = f32[4]{0} call(%p.2), to_apply=%callee\n",
    )
    callee = (
        "%callee (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n  ROOT"
        + fusion("c", 7, "%a")[1:]
        + "}\n\n"
    )
    text = HEADER + FUSED + callee + inner + forward + backward
    text += entry(
        fusion("e", 1)
        + while_op("fwd", "jit(step)/jvp()/while")
        + while_op("bwd", "jit(step)/transpose(jvp())/while")
    )
    # What is inside a fusion is in the fusion's own estimate.
    assert by_region(text) == {
        "entry": (1, 1),
        "forward loop": (3, 3 * (100 + 5 * 10)),
        "backward loop": (2, 2 * (1000 + 7)),
    }
    assert analyse(text).cycles == 1 + 450 + 2014
    top = analyse(text, num_top=2).top_ops
    assert [(op.name, op.times, op.cycles) for op in top] == [
        ("fusion.b", 2, 2000),
        ("fusion.f", 3, 300),
    ]


def test_loops_inside_another_loop_have_regions_of_their_own():
    """Gradient accumulation: the forward loops stand in a plain one; the cheaper of them is
    numbered.
    """
    text = (
        HEADER
        + FUSED
        + loop("l", 2, fusion("l", 1, "%p.2"))
        + loop("v", 4, fusion("v", 10, "%p.2"))
    )
    outer = (
        fusion("o", 100, "%p.2")
        + while_op("l", "jit(step)/while/body/jvp()/while")
        + while_op("v", "jit(step)/while/body/jvp()/while")
    )
    text += loop("acc", 3, outer) + entry(while_op("acc", "jit(step)/while"))
    assert by_region(text) == {
        "entry": (1, 0),
        "loop": (3, 300),
        "forward loop 2": (6, 6),
        "forward loop": (12, 120),
    }


def test_a_condition_may_be_fused_and_a_known_trip_count_wins():
    condition = """%fused_lt (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%cond_x (p.1: (s32[])) -> pred[] {
  %p.1 = (s32[]) parameter(0)
  %g = s32[] get-tuple-element(%p.1), index=0
  ROOT %f = pred[] fusion(%g), kind=kLoop, calls=%fused_lt
}

"""
    body = loop("x", 0, fusion("x", 10, "%p.2")).split("\n\n", 1)[1]
    while_line = while_op("x", "jit(step)/while")
    assert by_region(HEADER + FUSED + condition + body + entry(while_line))["loop"] == (6, 60)
    known = while_line.rstrip("\n") + ', backend_config={"known_trip_count":{"n":"9"}}\n'
    assert by_region(HEADER + FUSED + condition + body + entry(known))["loop"] == (9, 90)


def test_a_loop_whose_length_depends_on_data_counts_once_and_is_reported():
    condition = "%cond_d (p.1: (s32[], s32[])) -> pred[] {\n  %p.1 = (s32[], s32[]) parameter(0)\n"
    condition += (
        "  %i = s32[] get-tuple-element(%p.1), index=0\n"
        "  %n = s32[] get-tuple-element(%p.1), index=1\n"
    )
    condition += "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}\n\n"
    body = loop("d", 0, fusion("d", 10, "%p.2")).split("\n\n", 1)[1]
    report = analyse(HEADER + FUSED + condition + body + entry(while_op("d", "jit(step)/while")))
    assert report.num_unknown_trips == 1
    assert report.cycles == 10


def test_unknown_cycles_and_asynchronous_computations():
    called = (
        "%offloaded (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n"
        + fusion("k", 20, "%a")
        + "  ROOT"
    )
    called += fusion("u", 2**63 - 1, "%a")[1:] + '}, execution_thread="sparsecore"\n\n'
    start = (
        "  %s.1 = ((f32[4]), f32[4], u32[]{:S(8)}) call-start(%p.0), "
        'async_execution_thread="sparsecore", to_apply=%offloaded\n'
    )
    start += (
        "  %u.1 = ((f32[4]), f32[4]) call-update(%s.1), to_apply=%offloaded\n"
        "  %d.1 = f32[4]{0} call-done(%u.1), to_apply=%offloaded\n"
    )
    report = analyse(HEADER + FUSED + called + entry(start))
    assert (report.cycles, report.num_unknown_cycles) == (20, 1)


def test_the_costliest_branch_counts():
    branches = "".join(
        f"%branch_{n} (a: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} parameter(0)\n  "
        f"ROOT{fusion(f'n{n}', n, '%a')[1:]}}}\n\n"
        for n in (3, 8, 5)
    )
    line = (
        "  %c = f32[4]{0} conditional(%p.0, %p.0, %p.0), branch_computations={%branch_3, "
        "%branch_8, %branch_5}\n"
    )
    assert analyse(HEADER + FUSED + branches + entry(line)).cycles == 8
    line = (
        "  %c = f32[4]{0} conditional(%p.0, %p.0), true_computation=%branch_3, "
        "false_computation=%branch_5\n"
    )
    assert analyse(HEADER + FUSED + branches + entry(line)).cycles == 5


def test_a_kernel_spans_lines_and_has_no_estimate():
    kernel = (
        "  %splash.5 = (bf16[8,4]{1,0:T(8,128)}, f32[4]{0}) custom-call(%p.0), "
        'custom_call_target="tpu_custom_call", a={m={\n'
        '"xprof_metadata":"{\\"block_q\\": 512, \\"a\\" = 3}"\n'
        '}}, metadata={op_name="jit(step)/splash"}, backend_config={"custom_call_config":'
        '{"cost_estimate":{"flops":"70","transcendentals":"1"}}}\n'
    )
    other = '  %a.1 = f32[4]{0} custom-call(), custom_call_target="AllocateBuffer"\n'
    text = (
        HEADER
        + FUSED
        + loop(
            "k",
            3,
            kernel.replace("%p.0", "%p.2")
            + kernel.replace("splash.5", "splash.6").replace("%p.0", "%p.2"),
        )
    )
    report = analyse(text + entry(other + while_op("k", "jit(step)/jvp()/while") + fusion("e", 4)))
    assert report.kernels == (hlo.Kernel("splash", "forward loop", 6, 420),)
    assert report.kernel_flops == 420
    assert report.cycles == 4
    op = hlo_text.parse(HEADER + entry(kernel))["main"][1]
    assert (op.opcode, op.op_name, op.operands) == ("custom-call", "jit(step)/splash", ("p.0",))
    # What is kept for the backward pass is written into the array of all layers at once: the
    # compiler makes one op of both.
    fused = (
        "%fused_k (p.2: f32[4]) -> f32[4] {\n  %p.2 = f32[4]{0} parameter(0)\n"
        + kernel.replace("%p.0", "%p.2")
        + "}\n\n"
    )
    fused = fused.replace('{"flops":"70",', '{\n"bytes_accessed":5,\n"flops":70,\n')
    text = (
        HEADER
        + FUSED
        + fused
        + loop("f", 3, "  %k.1 = f32[4]{0} fusion(%p.2), kind=kCustom, calls=%fused_k\n")
    )
    report = analyse(text + entry(while_op("f", "jit(step)/jvp()/while")))
    assert report.kernels == (hlo.Kernel("splash", "forward loop", 3, 210),)


ADD = (
    "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n"
    "  %y = f32[] parameter(1)\n  ROOT %s = f32[] add(%x, %y)\n}\n\n"
)
BIG = "  %x.1 = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(1)\n  %y.1 = f32[10]{0} parameter(2)\n"


def collectives(lines, computations=""):
    return analyse(HEADER + FUSED + ADD + computations + entry(BIG + lines)).collectives


def only(lines, computations=""):
    (collective,) = collectives(lines, computations)
    return collective


def test_bytes_of_every_kind():
    """Counts the result of an all-gather and the operands of the others, without padding."""
    at = "channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true"
    gathered = only(
        f"  %g = bf16[32,100]{{1,0:T(8,128)(2,1)}} all-gather(%x.1), {at}, dimensions={{0}}\n"
    )
    assert (gathered.kind, gathered.axes, gathered.bytes) == ("all-gather", ("expert",), 6400)
    reduced = only(
        f"  %g = (bf16[8,100]{{1,0}}, /*index=1*/f32[10]{{0}}) all-reduce(%x.1, %y.1), {at}, "
        "to_apply=%add\n"
    )
    assert (reduced.kind, reduced.bytes) == ("all-reduce", 1640)
    scattered = only(
        f"  %g = bf16[2,100]{{1,0}} reduce-scatter(%x.1), {at}, dimensions={{0}}, to_apply=%add\n"
    )
    assert (scattered.kind, scattered.bytes) == ("reduce-scatter", 1600)
    assert (
        only(f"  %g = bf16[8,100]{{1,0}} all-to-all(%x.1), {at}, dimensions={{0}}\n").bytes == 1600
    )
    assert only(f"  %g = s4[6]{{0}} ragged-all-to-all(%y.1), {at}\n").kind == "ragged-all-to-all"


def test_equal_collectives_are_one_line_and_loops_multiply():
    gather = (
        "  %g.{} = bf16[32,100]{{1,0}} all-gather(%x.{}), replica_groups=[2,4]<=[8], "
        "dimensions={{0}}\n"
    )
    inside = "".join(
        f"  %x.{i} = bf16[8,100]{{1,0}} copy(%p.2)\n" + gather.format(i, i) for i in (2, 3)
    )
    report = analyse(
        HEADER
        + loop("g", 5, inside)
        + entry(BIG + gather.format(1, 1) + while_op("g", "jit(step)/jvp()/while"))
    )
    assert [(c.count, c.times, c.region, c.total_bytes) for c in report.collectives] == [
        (2, 5, "forward loop", 64_000),
        (1, 1, "entry", 6400),
    ]


def test_permutations_tell_their_axis():
    permuted = only(
        "  %s.2 = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%y.1), "
        "source_target_pairs={{0,1},{1,2},{4,5}}\n"
        "  %d.2 = f32[10]{0} collective-permute-done(%s.2)\n"
    )
    assert (permuted.kind, permuted.axes, permuted.bytes) == (
        "collective-permute",
        ("expert",),
        40,
    )


def test_seconds_of_equal_collectives_are_added_up():
    gather = "  %g.{} = bf16[32,100]{{1,0}} all-gather(%x.1), replica_groups=[2,4]<=[8]\n"
    text = HEADER + entry(BIG + gather.format(1) + gather.format(2))
    exposures = {"g.1": hlo.Exposure(2.0, 0.5), "g.2": hlo.Exposure(2.0, 1.5)}
    (collective,) = analyse(text, exposures=exposures).collectives
    assert (collective.count, collective.busy, collective.exposed) == (2, 4.0, 2.0)


def test_transfers_between_slices_are_collectives():
    attributes = (
        "channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = f"  %s.4 = (f32[10]{{0}}, u32[]{{:S(2)}}, token[]) send(%y.1, %p.0), {attributes}\n"
    lines += f"  %r.4 = (f32[10]{{0}}, u32[]{{:S(2)}}, token[]) recv(%p.0), {attributes}\n"
    done = "  %d.4 = token[] send-done(%s.4), channel_id=3\n"
    collective = only(lines + done)
    assert (collective.kind, collective.axes, collective.bytes) == ("all-reduce", ("slices",), 40)
    assert collectives(lines.replace("_xla_megascale_transfer_type", "other")) == ()


def test_collectives_wrapped_in_asynchronous_calls():
    wrapped = "%wrapped (a: bf16[8,100]) -> bf16[8,100] {\n  %a = bf16[8,100]{1,0} parameter(0)\n"
    wrapped += (
        "  ROOT %t = bf16[8,100]{1,0} all-to-all(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}, "
        "dimensions={0}\n}\n\n"
    )
    start = "  %s = ((bf16[8,100]), bf16[8,100], u32[]) async-start(%x.1), calls=%wrapped\n"
    done = "  %d = bf16[8,100]{1,0} async-done(%u), calls=%wrapped\n"
    update = "  %u = ((bf16[8,100]), bf16[8,100], u32[]) async-update(%s), calls=%wrapped\n"
    collective = only(start + fusion("x", 5) + update + done, wrapped)
    assert (collective.kind, collective.axes, collective.count) == ("all-to-all", ("data",), 1)


def test_fused_collectives():
    """A TPU writes a reduce-scatter as a fusion of an all-reduce and a slice."""

    def fused(name, rest):
        return (
            f"%{name} (a: bf16[8,100]) -> bf16[2,100] {{\n"
            f"  %a = bf16[8,100]{{1,0}} parameter(0)\n{rest}}}\n\n"
        )

    reduce = (
        "  %r = bf16[8,100]{1,0} all-reduce(%a), replica_groups=mesh['axis_0'=8] {'axis_0'}, "
        "to_apply=%add\n"
    )
    scatter = fused(
        "all-reduce-scatter.1",
        reduce
        + "  ROOT %d = bf16[2,100]{1,0} dynamic-slice(%r, %a), dynamic_slice_sizes={2,100}\n",
    )
    line = (
        f"  %f = bf16[2,100]{{1,0}} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1, "
        f"{cycles(50)}\n"
    )
    collective = only(line, scatter)
    assert (collective.kind, collective.axes, collective.bytes) == (
        "reduce-scatter",
        ("data", "expert"),
        1600,
    )
    # The time of a collective is no compute, whatever the compiler writes.
    assert analyse(HEADER + ADD + scatter + entry(BIG + line)).cycles == 0
    product = fused("both", reduce + "  ROOT %c = bf16[2,100]{1,0} convolution(%r, %a)\n")
    collective = only("  %f = bf16[2,100]{1,0} fusion(%x.1), kind=kOutput, calls=%both\n", product)
    assert collective.kind == "all-reduce"


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        (
            "replica_groups=mesh['replica'=1,'data'=2,'expert'=4,'tensor'=1] {'expert'}",
            ("expert",),
        ),
        (
            "replica_groups=mesh['replica'=1,'data'=2,'expert'=4,'tensor'=1] {'data','expert'}",
            ("data", "expert"),
        ),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "expert")),
        ("replica_groups=mesh['data'=2,'expert'=4] {'expert':(2)2}", ("expert/2",)),
        ("replica_groups=mesh['data'=2,'expert'=4] {'data','expert':(1)2}", ("data", "expert/2")),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",)),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "expert")),
        ("replica_groups={}", ("data", "expert")),
        ("replica_groups=[2,4]<=[8]", ("expert",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "expert")),
        ("source_target_pairs={{0,4},{4,0}}", ("data",)),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ],
)
def test_groups_become_axes(text, axes):
    assert (
        replica_groups.axes_of(
            replica_groups.parse(f"channel_id=1, {text}, dimensions={{0}}", 8), MESH
        )
        == axes
    )


def test_parts_of_an_axis_are_the_right_devices():
    """'expert':(1)2 is the outer half of the axis, (2)2 the inner."""
    assert replica_groups.parse("replica_groups=mesh['data'=2,'expert'=4] {'expert':(1)2}", 8)[
        0
    ] == [0, 2]
    assert replica_groups.parse("replica_groups=mesh['data'=2,'expert'=4] {'expert':(2)2}", 8)[
        0
    ] == [0, 1]


def test_groups_in_an_unknown_form_are_marked():
    assert only(
        "  %g = bf16[8,100]{1,0} all-to-all(%x.1), replica_groups=@new, dimensions={0}\n"
    ).axes == ("?",)


def test_shapes():
    assert (
        hlo_text.num_bytes(
            "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[], pred[5], f8e4m3fn[4], s32[0])"
        )
        == 12 + 4 + 5 + 4
    )
    assert hlo_text.split_tuple("((f32[2]{0:T(8,128)(2,1)}, s32[]), /*index=1*/u32[]{:S(2)})") == [
        "(f32[2]{0:T(8,128)(2,1)}, s32[])",
        "u32[]{:S(2)}",
    ]
    assert hlo_text.split_tuple("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo_text.parse(HEADER + FUSED)


# --- memory by line item


def config(mesh=None, **changes):
    """A small model of the recipe's kind, one sequence a device on 16 of them."""
    changes = {"dtype": "bfloat16", "num_kv_heads": 4, "remat": "full"} | changes
    model = dataclasses.replace(presets.tiny(), **changes)
    train = TrainConfig(batch_size=16, seq_len=256)
    return Config(model, mesh=mesh or MeshConfig(data=-1, expert=4), train=train)


def items(cfg, num_devices=16):
    return {
        (item.name, item.phase): item.bytes for item in memory.estimate(cfg, num_devices).items
    }


def test_state_items_are_exact():
    cfg = config()
    found = items(cfg)
    num_params = sum(math.prod(shape) for shape in _shapes(cfg))
    # Norms are whole on every device; all else is split over all 16.
    assert found["weights", memory.ALWAYS] == pytest.approx(4 * num_params / 16, rel=0.05)
    assert found["optimizer state", memory.ALWAYS] == pytest.approx(8 * num_params / 16, rel=0.05)
    # Matrices have bfloat16 gradients.
    assert found["gradients", memory.LAYERS] == pytest.approx(
        found["weights", memory.ALWAYS] / 2, rel=0.05
    )


def test_a_teacher_has_a_line_of_its_own():
    teacher = paths.ROOT / "tests/golden/hf/moe_top1"
    cfg = recipes.config_of(
        "distill",
        "stdlib",
        train__init_from="",
        model__num_layers=1,
        objective__distill__teacher=str(teacher),
    )
    found = items(dataclasses.replace(cfg, mesh=MeshConfig()), 1)
    plain = dataclasses.replace(cfg, objective=ObjectiveConfig())
    assert found["batch", memory.ALWAYS] == items(plain, 1)["batch", memory.ALWAYS]
    shapes = _shapes(dataclasses.replace(cfg, model=open_model(teacher).cfg))
    assert found["teacher", memory.ALWAYS] == 4 * sum(map(math.prod, shapes))


def _shapes(cfg):
    return [
        leaf.shape for leaf in jax.tree.leaves(abstract_model(cfg.model, single_device_mesh())[1])
    ]


def test_items_halve_on_twice_the_devices():
    small, large = items(config(), 8), items(config(), 16)
    ratio = {key: small[key] / large[key] for key in small}
    for key in (
        ("weights", memory.ALWAYS),
        ("optimizer state", memory.ALWAYS),
        ("gradients", memory.LAYERS),
    ):
        assert ratio[key] == pytest.approx(2, rel=0.05)
    for key in (
        ("kept for the backward pass", memory.LAYERS),
        ("logits", memory.LOSS),
        ("activations of a group", memory.LAYERS),
    ):
        assert ratio[key] == pytest.approx(2)
    assert ratio["gathered weights", memory.LAYERS] == 1


def test_twice_the_batch_doubles_activations_only():
    cfg = config()
    once, twice = (
        items(cfg),
        items(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=32))),
    )
    for key in once:
        is_state = key[0] in (
            "weights",
            "optimizer state",
            "gradients",
            "gathered weights",
            "gathered vocabulary",
        )
        assert twice[key] == (1 if is_state else 2) * once[key], key


def test_dtypes_and_remat_act():
    base, cfg = items(config()), config()
    assert (
        items(config(remat="dots"))["kept for the backward pass", memory.LAYERS]
        > base["kept for the backward pass", memory.LAYERS]
    )
    assert (
        items(config(remat="none"))["kept for the backward pass", memory.LOSS]
        > items(config(remat="dots"))["kept for the backward pass", memory.LOSS]
    )
    wide = config()
    wide = items(dataclasses.replace(wide, model=dataclasses.replace(wide.model, dtype="float32")))
    for name in ("kept for the backward pass", "gathered weights", "activations of a group"):
        assert wide[name, memory.LAYERS] == 2 * base[name, memory.LAYERS]
    accumulated = items(
        dataclasses.replace(
            cfg, train=dataclasses.replace(cfg.train, batch_size=32, grad_accum_steps=2)
        )
    )
    assert (
        accumulated["gradients", memory.LAYERS]
        == base["gradients", memory.LAYERS] + base["weights", memory.ALWAYS]
    )
    assert accumulated["logits", memory.LOSS] == base["logits", memory.LOSS]


def test_expert_and_tensor_axes_split_what_they_should():
    base = items(config())
    split = items(config(MeshConfig(data=-1, expert=8)))
    assert split["gathered weights", memory.LAYERS] < base["gathered weights", memory.LAYERS]
    assert (
        split["kept for the backward pass", memory.LAYERS]
        == base["kept for the backward pass", memory.LAYERS]
    )
    cfg = config(MeshConfig(data=-1, expert=4, tensor=2))
    split = items(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=8)))
    assert split["gathered weights", memory.LAYERS] == base["gathered weights", memory.LAYERS] // 2
    assert split["logits", memory.LOSS] < base["logits", memory.LOSS]


def test_capacity_dropless_and_dense_models():
    def changed(**moe):
        cfg = config()
        return items(
            dataclasses.replace(
                cfg,
                model=dataclasses.replace(
                    cfg.model, moe=dataclasses.replace(cfg.model.moe, **moe)
                ),
            )
        )

    key = ("activations of a group", memory.LAYERS)
    assert changed(capacity_factor=2.0)[key] > changed()[key]
    assert changed(dispatch="dropless")[key] == changed()[key]
    assert changed(dispatch="dropless", top_k=2)[key] > changed()[key]
    assert (
        changed(num_shared_experts=2)["gathered weights", memory.LAYERS]
        > changed()["gathered weights", memory.LAYERS]
    )
    dense = dataclasses.replace(config(MeshConfig(data=-1)).model, moe=type(presets.tiny().moe)())
    assert items(dataclasses.replace(config(MeshConfig(data=-1)), model=dense))[key] > 0


def test_a_row_over_several_chips():
    mesh = MeshConfig(data=1, context=4, expert=4)
    changes = {"moe": dataclasses.replace(config().model.moe, group_size=32)}
    spread, alone = config(mesh, **changes), config(**changes)
    found, expected = items(spread), items(alone)
    for key in [("weights", memory.ALWAYS), ("kept for the backward pass", memory.LAYERS)]:
        assert found[key] == pytest.approx(expected[key], rel=0.05), key
    chosen, *others = memory.context_forms(spread, 16)
    assert found["keys and values of whole rows", memory.LAYERS] == chosen.held_bytes
    assert {form.name for form in (chosen, *others)} == {"gather", "ring", "all_to_all"}
    assert all(form.refusal or form.sent_bytes >= chosen.sent_bytes for form in others)
    assert memory.context_forms(alone, 16) == ()
    # A sequence for every four devices.
    assert search.with_batch(spread, 16, 2).train.batch_size == 8


def test_peak_is_the_state_and_the_largest_phase():
    estimate = memory.estimate(config(), 16)
    phases = (memory.LAYERS, memory.LOSS, memory.UPDATE)
    assert estimate.peak == estimate.in_phase(memory.ALWAYS) + max(
        estimate.in_phase(phase) for phase in phases
    )
    assert sum(estimate.in_phase(phase) for phase in (memory.ALWAYS, *phases)) == sum(
        item.bytes for item in estimate.items
    )


# --- errors and options


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5pp:2x2x1", "v5p:2x2x1"),
        ("v5p:2x2", "v5p:2x2x1"),
        ("v5e:4x4x1", "v5e:4x4"),
        ("v7x:2x2x1", "tpu7x:2x2x1"),
        ("v5p:0x2x1", "v5p:"),  # the compiler itself would end the process
        ("banana", "the nearest that can be rented are"),
    ],
)
def test_unknown_topologies_name_the_nearest(name, expected):
    with pytest.raises(ConfigError, match=re.escape(f"--topology={name} is not known")) as error:
        topology.chip_of(name)
    assert expected in str(error.value)


def test_devices_of_a_slice():
    assert topology.num_devices("v5p:4x8x8") == 256
    assert topology.num_devices("tpu7x:2x2x1") == 8
    assert topology.num_devices("v6e:4x4", num_slices=3) == 48
    for name in topology.known_names():
        assert topology.num_devices(name) > 0


def test_slices_grow():
    for generation, shapes in topology.SLICES.items():
        sizes = [topology.num_devices(f"{generation}:{shape}") for shape in shapes]
        assert all(a < b for a, b in itertools.pairwise(sizes))


def test_missing_libtpu_is_named(monkeypatch, plan):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "libtpu" else real(name, *args),
    )
    with pytest.raises(ConfigError, match=re.escape("pip install -e '.[tpu]'")):
        plan("--topology=v5p:2x2x1")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "--topology is missing"),
        (("--topology=v5p:2x2x1", "--fit"), "leave --topology out"),
        (("--topology=v5p:2x2x1", "--fit", "--search"), "one at a time"),
        (("--topology=v5p:2x2x1", "--generation=v5p"), "--generation acts with --fit only"),
        (("--topology=v5p:2x2x1", "--compile_top=1"), "--compile_top acts with --search only"),
        (("--fit", "--generation=v9"), "v5p"),
        (("--topology=v5p:2x2x1", "--fast", "--search"), "--fast leaves out"),
        (("--topology=v5q:2x2x1",), "v5p:2x2x1"),
    ],
)
def test_options_that_make_no_sense(options, expected, plan):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        plan(*options)


_LONG_MESSAGE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. \
Used 63.80G of 30.75G hbm. Exceeded.

Total hbm usage >= 65.05G:
    reserved          1.25G

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/jvp(Model)/dot_general[precision=None]" \
source_file="a.py" source_line=9
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     ==========================

  2. Size: 512.00M
     Shape: bf16[8]{0}
     Unpadded size: 1.00K
"""


def test_overflow_messages_are_read():
    short = (
        "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries (108.57G) "
        "exceeds available HBM (95.73G). HLO module"
    )
    overflow = aot.parse_overflow(short)
    assert overflow.used == pytest.approx(108.57 * 2**30)
    assert overflow.available == pytest.approx(95.73 * 2**30)
    assert overflow.largest == ()
    overflow = aot.parse_overflow(_LONG_MESSAGE)
    assert overflow.used == pytest.approx(63.80 * 2**30)
    assert overflow.largest == (
        "2.00G f32[32,4096,4096]{1,2,0:T(8,128)} of jit(step)/jvp(Model)/dot_general",
        "512.00M bf16[8]{0}",
    )
    assert aot.parse_overflow("INTERNAL: Mosaic failed to compile") is None


def test_overflow_errors_say_what_could_fit():
    def text(message, cfg):
        return str(aot._overflow_error(aot.parse_overflow(message), cfg, 16))

    lean = dataclasses.replace(config(), optimizer=OptimizerConfig(state_dtype="fp8_lm"))
    assert "33.0 GiB too much" in text(_LONG_MESSAGE, lean)
    assert "2.00G f32[32,4096,4096]" in text(_LONG_MESSAGE, lean)
    short = "required (20G) exceeds available HBM (10G)"
    assert "by our estimate" in text(short, config())
    assert "fp8_lm" in text(short, config())
    assert "remat" in text(short, config(remat="none"))
    assert "batch_size" in text(
        short, dataclasses.replace(config(), train=TrainConfig(batch_size=32))
    )
    for word in ("remat", "state_dtype", "batch_size"):
        assert word not in text(short, lean)
    assert "--fit" in text(short, lean)


# --- the search, without the compiler


@pytest.fixture
def compiled(monkeypatch):
    """Replaces compiling by an answer: peaks of twice the estimate, a share of ideal that favours
    larger batches.
    """
    seen = []

    def report(cfg, name, is_fast=False):
        num_devices = topology.num_devices(name)
        items = memory.estimate(cfg, num_devices)
        seen.append((name, cfg))
        stats = aot.DeviceMemory(2**20, 0, 0, 0, 2 * items.peak, topology.chip_of(name).hbm_bytes)
        if stats.peak > stats.hbm:
            raise aot.HbmOverflowError("too large", aot.Overflow(stats.peak, stats.hbm, ()))
        empty = hlo.HloReport((), (), (), (), 0, 0)
        share = cfg.train.batch_size / 100
        mesh = memory.mesh_sizes(cfg, num_devices)
        return aot.Report(
            name,
            num_devices,
            1,
            mesh,
            1,
            stats,
            items,
            1,
            1.0,
            1.0,
            share,
            share,
            1.0,
            *([None] * 4 if is_fast else [0.5, 1 / share, share, 2 / share]),
            1e9,
            1e14,
            empty,
            1.0,
            1,
            timeline.Timeline(1 / share, 1.0, {}, (), ()),
        )

    monkeypatch.setattr(aot, "report", report)
    monkeypatch.setattr(topology, "load_compiler", lambda: None)
    return seen


@pytest.mark.heavy
def test_search_tries_everything_and_compiles_the_first(compiled):
    trials = search.search(config(), "v5p:2x2x1", [1, 2], compile_top=3)
    assert len(compiled) == 3
    assert [trial.report is not None for trial in trials[:4]] == [True, True, True, False]
    seconds = [trial.report.all_in_seconds for trial in trials[:3]]
    assert seconds == sorted(seconds)
    configs = [trial.config for trial in trials]
    assert len(set(configs)) == len(configs)
    assert {c.model.remat for c in configs} == {"none", "dots", "full"}
    assert {c.optimizer.state_dtype for c in configs} == {"float32", "bfloat16", "fp8_lm"}
    assert {c.train.batch_size for c in configs} == {4, 8}
    meshes = {(memory.mesh_sizes(c, 4)["data"], c.mesh.expert, c.mesh.tensor) for c in configs}
    assert {(4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)} <= meshes
    # Recomputation comes last, and of equals the more exact state first.
    states = [
        (dataclasses.replace(c, optimizer=OptimizerConfig()), c.optimizer.state_dtype)
        for c in configs[3:]
    ]
    assert all(b[1] != "float32" for a, b in itertools.pairwise(states) if a[0] == b[0])
    order = [c.model.remat == "full" for c in configs[3:]]
    assert order == sorted(order)


def test_search_where_nothing_fits(compiled, monkeypatch):
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(hbm_bytes=2**16))
    with pytest.raises(ConfigError, match="nothing fits on v5e:2x2"):
        search.search(config(), "v5e:2x2", [1], compile_top=1)


@pytest.mark.heavy
def test_search_where_no_mesh_suits(compiled):
    cfg = config(MeshConfig(data=-1, expert=1))
    moe = dataclasses.replace(cfg.model.moe, num_experts=7)
    sizes = {"hidden_size": 127, "num_kv_heads": 1, "num_heads": 1, "intermediate_size": 191}
    odd = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe, **sizes))
    with pytest.raises(ConfigError, match="no mesh over the 4 devices of v5e:2x2"):
        search.search(odd, "v5e:2x2", [1], compile_top=1)


def test_fit_gives_up_where_the_compiler_refuses_the_program(compiled, monkeypatch):
    def refuse(cfg, name):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile\nmore")

    monkeypatch.setattr(aot, "report", refuse)
    trials = search.fit(config(MeshConfig(data=-1, expert=1)), ["v5e"], batch_per_chip=1)
    assert [trial.outcome for trial in trials] == [
        "the compiler refuses it: INTERNAL: Mosaic failed to compile"
    ]


def test_fit_stops_at_the_smallest_slice_that_holds_it(compiled, monkeypatch):
    # 2x2 is refused by the estimate, 2x4 by the compiler, which finds twice as much, 4x4 by
    # neither; 1x1 cannot hold the mesh.
    cfg = config(MeshConfig(data=-1, expert=2))
    peaks = {n: memory.estimate(search.with_batch(cfg, n, 2), n).peak for n in (4, 8, 16)}
    hbm = max(2 * peaks[16], int(peaks[4] / 1.2))
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(hbm_bytes=hbm))
    trials = search.fit(cfg, ["v5e"], batch_per_chip=2)
    assert [trial.topology for trial in trials] == ["v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4"][
        : len(trials)
    ]
    assert [bool(trial.report) for trial in trials] == [False] * (len(trials) - 1) + [True]
    assert trials[0].estimate is None and "config.mesh" in trials[0].outcome
    assert all(trial.config.train.batch_size == 2 * trial.num_devices for trial in trials)
    assert len(compiled) == sum(
        trial.outcome != "too little memory, by estimate" for trial in trials[1:]
    )


@pytest.mark.heavy
def test_the_command_passes_its_options_on(compiled, capsys, plan):
    def run(*options):
        assert plan(*options) == 0
        return capsys.readouterr().out

    rows = json.loads(
        run("--topology=v5p:2x2x1", "--search", "--compile_top=1", "--batch_per_chip=2", "--json")
    )
    assert len(compiled) == 1
    assert {row["batch_size"] for row in rows} == {8}
    rows = json.loads(run("--topology=v5p:2x2x1", "--search", "--compile_top=0", "--json"))
    assert {row["batch_size"] for row in rows} == {4, 8, 16}
    rows = json.loads(run("--fit", "--generation=v6e", "--json"))
    assert {row["topology"].split(":")[0] for row in rows} == {"v6e"}
    assert {row["topology"].split(":")[0] for row in json.loads(run("--fit", "--json"))} == set(
        topology.SLICES
    )
    assert [
        row["batch_size"]
        for row in json.loads(run("--fit", "--generation=v6e", "--batch_per_chip=3", "--json"))
    ] == [3]
    assert "best first" in run("--topology=v5p:2x2x1", "--search")
    assert (
        json.loads(run("--topology=v5p:2x2x1", "--batch_per_chip=4", "--json"))["topology"]
        == "v5p:2x2x1"
    )
    assert compiled[-1][1].train.batch_size == 16
    report = json.loads(run("--topology=v5p:2x2x1", "--fast", "--json"))
    assert (report["all_in_seconds"], report["all_in_mfu"]) == (None, None)
    printed = run("--topology=v5p:2x2x1", "--fast")
    assert "Left out: how long compute waits" in " ".join(printed.split())
    assert "share of ideal, all-in" not in printed


# --- with the compiler


@NEEDS_LIBTPU
@pytest.mark.heavy
def test_a_tiny_plan_end_to_end(capsys, plan, monkeypatch):
    compile_step, steps = aot.compile_step, []
    monkeypatch.setattr(
        aot, "compile_step", lambda *args: steps.append(compile_step(*args)) or steps[-1]
    )
    options = [
        # A layer a group and one block of attention: a step has each kernel once or twice.
        "--config.model.num_layers=2",
        "--config.model.cla_share_factor=1",
        "--config.train.seq_len=128",
        "--config.model.dtype=bfloat16",
        "--config.mesh.expert=2",
        "--topology=v5p:2x2x1",
    ]
    assert plan(*options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    stats = report["memory"]
    assert stats["arguments"] < stats["peak"] < stats["hbm"]
    assert report["mesh"] == {
        "replica": 1,
        "data": 2,
        "context": 1,
        "expert": 2,
        "tensor": 1,
    }
    assert report["estimated_peak"] > 0
    assert report["difference"] == pytest.approx(report["estimated_peak"] / stats["peak"] - 1)
    kinds = {
        (collective["kind"], tuple(collective["axes"]))
        for collective in report["hlo"]["collectives"]
    }
    # Tokens travel to their experts and back; the gradient of an expert weight returns as a
    # reduce-scatter over `data`.
    assert {("all-to-all", ("expert",)), ("reduce-scatter", ("data",))} <= kinds
    text = steps[0].compiled.as_text()
    for kernel in ("gate_up", "matmul", "gated_gradient", "input_gradient", "weight_gradient"):
        assert re.search(rf"%expert_{kernel}[.\d]* = .*tpu_custom_call", text), kernel
    for kernel in ("forward", "backward"):
        assert re.search(rf"%flash_attention_{kernel}[.\d]* = .*tpu_custom_call", text), kernel
    assert not any("?" in axes for _, axes in kinds)
    assert {"entry", "forward loop", "backward loop"} <= {
        region["name"] for region in report["hlo"]["regions"]
    }
    assert 0 < report["all_in_share_of_ideal"] < report["share_of_ideal"] < 1
    assert report["all_in_seconds"] == pytest.approx(
        report["compute_seconds"] + report["exposed_seconds"]
    )
    assert report["exposed_seconds"] == pytest.approx(
        sum(collective["exposed"] for collective in report["hlo"]["collectives"])
    )
    assert report["all_in_mfu"] == pytest.approx(
        report["mfu"] * report["estimated_seconds"] / report["all_in_seconds"]
    )
    assert 0 < report["all_in_mfu"] < report["mfu"] < 1
    assert report["slow_links_seconds"] >= report["all_in_seconds"]
    assert report["peak_bytes"] == stats["peak"]
    assert 0 < report["compile_seconds"] < 300
    assert report["host_bytes"] > 2**26


def test_the_recipe_states_the_time_of_the_results_page():
    recipe = (paths.ROOT / "configs/a52b.py").read_text(encoding="utf-8")
    page = (paths.ROOT / "docs/results/plan.md").read_text(encoding="utf-8")
    words = " ".join(recipe.split())
    for row, text, num_devices, num_chips in (
        (r"all-in at 180 GB/s an axis", "takes {} s on v5p 4x8x8", 256, 256),
        (r"v6e:16x16 \| TensorCores", "On v6e 16x16 it takes {} s", 256, 256),
        (r"tpu7x:4x4x4 \| TensorCores", "On tpu7x 4x4x4 0.52 M tokens take {} s", 128, 64),
    ):
        (seconds,) = re.findall(rf"{row} \|.*\*\*([\d.]+) s,", page)
        tokens_per_second = num_devices * 4096 / float(seconds)
        chip_hours = 7e12 / tokens_per_second * num_chips / 3600
        assert text.format(seconds) in words
        assert f"{tokens_per_second * 86400 / 1e9:.1f} billion tokens a day" in words
        assert f"{chip_hours / 1e6:.2f} million chip-hours" in words


def test_the_error_of_the_all_in_time_is_that_of_the_published_steps():
    page = (paths.ROOT / "docs/results/calibration.md").read_text(encoding="utf-8")
    errors = [int(percent) for percent in re.findall(r"\| ([+-]\d+) % \|$", page, re.MULTILINE)]
    assert len(errors) == 3
    assert max(map(abs, errors)) == round(100 * aot.ALL_IN_ERROR)


@NEEDS_LIBTPU
def test_what_the_compiler_and_the_rules_refuse(plan):
    with pytest.raises(ConfigError, match=r"v5p:3x3x3: the compiler refuses it.*nearest"):
        plan("--topology=v5p:3x3x3")
    with pytest.raises(ConfigError, match="6"):
        plan("--topology=v5p:2x2x1", "--config.train.batch_size=6")
    with pytest.raises(ConfigError, match="does not use the 4 devices exactly"):
        plan("--topology=v5p:2x2x1", "--config.mesh.data=3")


def test_reports_print(compiled, capsys):
    report = aot.report(config(), "v5p:2x2x2")
    collective = hlo.Collective("all-gather", ("data",), 2**20, 2, 3, "entry", 0.0123, 0.0045)
    region, kernel, op = (
        hlo.Region("entry", "", 1, 10),
        hlo.Kernel("splash", "entry", 4, 8 * 10**12),
        hlo.CostlyOp("f.1", "f32[]", "jit", "entry", 1, 10),
    )
    filled = hlo.HloReport((region,), (kernel,), (op,), (collective,), 34, 1)
    forms = Form("gather", 3 * 2**30, 2**30), Form("all_to_all", 2**30, 2**20, "too few heads")
    filled_in = {"hlo": filled, "clock_hz": 1.75e9, "context_forms": forms}
    show.print_report(dataclasses.replace(report, **filled_in))
    printed = capsys.readouterr().out
    for word in (
        "8 chips",
        "difference",
        "gathered weights",
        "kernel splash",
        "left out",
        "all-gather",
        "12.3",
        "4.5",
        "scaling-book",
        "34",
        "not a measurement",
        "f.1",
        "too few heads",
        "implied MFU, all-in",
        "x[index]",
    ):
        assert word in printed, word
