"""The walk of a schedule on small texts; rings and messages on small tori; the page."""

import dataclasses
import types

import numpy as np
import pytest

from hunyuan_jax.config import MeshConfig
from hunyuan_jax.plan import hlo_text, kernel_speed, links, page, timeline, topology
from hunyuan_jax.plan.links import Links, Ring
from pallas_kernels.chips import CHIPS

MESH = {"data": 2, "expert": 4}
# 6400 bytes over `expert` take 6400 * 3/4 / (2 * 2400) = 1 s; cycles are seconds.
LINKS = Links({"data": Ring(2, 2, 1, 1), "expert": Ring(4, 4, 1, 2)}, 2400.0)

START = (
    "  %s.1 = (bf16[8,100]{1,0}, bf16[32,100]{1,0}) all-gather-start(%x), "
    "replica_groups=[2,4]<=[8], dimensions={0}\n"
)
DONE = "  %d.1 = bf16[32,100]{1,0} all-gather-done(%s.1)\n"
GATHER = "bf16[32,100]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}\n"


def work(seconds: int, name: str = "w") -> str:
    return (
        f"  %{name} = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%f, "
        f'backend_config={{"estimated_cycles":"{seconds}"}}\n'
    )


def walk(lines: str, computations: str = "") -> timeline.Timeline:
    text = (
        "HloModule m, is_scheduled=true\n\n"
        "%f (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n}\n\n"
        f"{computations}ENTRY %main (x: bf16[8,100]) -> f32[] {{\n"
        f"  %x = bf16[8,100]{{1,0}} parameter(0)\n{lines}}}\n"
    )
    return timeline.walk(hlo_text.parse(text), MESH, LINKS, 1.0, lambda kernel: 0.0)


def test_a_synchronous_collective_stops_compute():
    found = walk(work(3) + f"  %g = {GATHER}" + work(2, "v"))
    assert (found.seconds, found.compute) == (6.0, 5.0)
    assert found.collectives == {"g": (1.0, 1.0)}


@pytest.mark.parametrize(("between", "exposed"), [(0, 1.0), (2, 0.0)])
def test_an_asynchronous_one_is_hidden_by_what_is_scheduled_between(between, exposed):
    found = walk(START + (work(between) if between else "") + DONE)
    assert found.collectives == {"s.1": (1.0, exposed)}
    assert found.seconds == between + exposed


def test_one_axis_carries_one_collective_at_a_time():
    second = START.replace("s.1", "s.2"), DONE.replace("s.1", "s.2").replace("d.1", "d.2")
    found = walk(START + second[0] + work(1) + DONE + second[1])
    assert found.seconds == 2.0
    assert found.collectives == {"s.1": (1.0, 0.0), "s.2": (1.0, 1.0)}
    # On another axis it does not wait.
    other = second[0].replace("[2,4]<=[8]", "[4,2]<=[2,4]T(1,0)")
    found = walk(START + other + work(1) + DONE + second[1])
    assert found.seconds == 1.0


def test_a_sparse_core_transfer_begins_at_its_update():
    wrapped = (
        "%sparse (a: bf16[8,100]) -> bf16[32,100] {\n  %a = bf16[8,100]{1,0} parameter(0)\n"
        "  ROOT %g = bf16[32,100]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], "
        'dimensions={0}\n}, execution_thread="sparsecore"\n\n'
    )
    start = "  %c = ((), bf16[32,100]) call-start(), to_apply=%sparse\n"
    update = "  %u = ((bf16[8,100]), bf16[32,100]) call-update(%c, %x)\n"
    done = "  %d = bf16[32,100]{1,0} call-done(%u)\n"
    late = walk(start + work(5) + update + done, wrapped)
    early = walk(start + update + work(5) + done, wrapped)
    assert (late.seconds, early.seconds) == (6.0, 5.0)
    assert late.collectives == {"g": (1.0, 1.0)} and early.collectives == {"g": (1.0, 0.0)}


def test_loops_multiply_and_begin_with_idle_links():
    body = (
        "%body (p: f32[4]) -> f32[4] {\n  %x = bf16[8,100]{1,0} parameter(0)\n"
        + START
        + work(2, "b")
        + DONE
        + "}\n\n%cond (p: f32[4]) -> pred[] {\n  ROOT %c = pred[] constant(true)\n}\n\n"
    )
    loop = (
        "  %l = f32[4] while(%x), condition=%cond, body=%body, "
        'backend_config={"known_trip_count":{"n":"7"}}\n'
    )
    found = walk(loop + work(1), body)
    assert (found.seconds, found.compute) == (15.0, 15.0)
    assert found.collectives == {"s.1": (7.0, 0.0)}
    (inner,) = found.loops
    assert (inner.times, inner.seconds) == (7, 2.0)
    assert {(e.lane, e.start, e.end) for e in inner.events} == {
        ("compute", 0.0, 2.0),
        ("expert", 0.0, 1.0),
    }


def test_kernels_run_at_their_share_of_the_peak():
    kernel = hlo_text.parse(
        "ENTRY %main (x: f32[]) -> f32[] {\n  %expert_gate_up.3 = f32[] custom-call(), "
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
        '{"cost_estimate":{"flops":"459000000000000"}}}\n}\n'
    )["main"][0]
    v5p = CHIPS["v5p"]
    assert kernel_speed.seconds_on(v5p)(kernel) == pytest.approx(1 / 0.973)
    other = dataclasses.replace(kernel, name="unlisted.1")
    assert kernel_speed.seconds_on(v5p)(other) == pytest.approx(1.0)
    for head_dim, share in ((80, 0.582), (96, 0.582), (128, 0.795)):
        shape = f"(bf16[1,8,10,{head_dim},4096]{{4,3,2,1,0}}, f32[1,8,10,1,4096]{{4,3,2,1,0}})"
        attention = dataclasses.replace(kernel, name="flash_attention_forward.2", shape=shape)
        assert kernel_speed.seconds_on(v5p)(attention) == pytest.approx(1 / share)


def test_lookups_of_rows_take_their_static_cycles():
    fused = (
        "%g (x: bf16[64,6400], i: s32[4096,1]) -> bf16[4096,6400] {\n"
        "  %x = bf16[64,6400]{1,0} parameter(0)\n  %i = s32[4096,1]{1,0} parameter(1)\n"
        "  ROOT %r = bf16[4096,6400]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,6400}\n"
        "}\n\n"
    )
    lookup = "  %r.1 = bf16[4096,6400]{1,0} fusion(%x, %x), kind=kCustom, calls=%g"
    unknown = ', backend_config={"estimated_cycles":"9223372036854775807"}'
    assert walk(f"{lookup}\n", fused).compute == 4096 * 12800 / 250
    # The compiler says so of what the SparseCore looks up.
    assert walk(f"{lookup}{unknown}\n", fused).compute == 0
    numbers = fused.replace("bf16[4096,6400]", "f32[4096]").replace("{1,6400}", "{1,1}")
    assert walk(lookup.replace("[4096,6400]", "[4096]") + "\n", numbers).compute == 40960


# --- links


def mesh_of(order: np.ndarray, axes: tuple[str, ...]):
    """Devices of an array of chips' coordinates."""
    devices = np.empty(order.shape[:-1], object)
    for place in np.ndindex(devices.shape):
        devices[place] = types.SimpleNamespace(coords=tuple(int(i) for i in order[place]))
    return types.SimpleNamespace(
        devices=devices,
        axis_names=axes,
        shape=dict(zip(axes, devices.shape, strict=True)),
    )


def grid(*shape: int) -> np.ndarray:
    return np.moveaxis(np.indices(shape), 0, -1)


def test_a_whole_dim_of_the_torus_is_a_ring():
    found = links.links_of(mesh_of(grid(4, 4, 4), ("a", "b", "c")), "v5p")
    # Ring of four: to the neighbours one message, to the one opposite half of them each way.
    assert set(found.rings.values()) == {Ring(size=4, chips=4, flows=1, messages=2)}
    # 16 * 3/4 over two links of 90 GB/s.
    assert found.seconds("all-gather", ("a",), 16 * 10**9) == pytest.approx(12 / 180)
    assert found.seconds("all-reduce", ("a",), 16 * 10**9) == pytest.approx(24 / 180)
    assert found.seconds("all-to-all", ("a",), 16 * 10**9) == pytest.approx(4 * 2 / 90)


def test_a_part_of_a_dim_has_no_way_around():
    halves = grid(8, 4, 1).reshape(2, 4, 4, 3)
    found = links.links_of(mesh_of(halves, ("a", "b", "c")), "v5p")
    # Four of eight in a line: what comes back shares the links.
    assert found.rings["b"].flows == 2
    # Two chips that are four apart, in both directions of two directions.
    assert found.rings["a"].flows == 4
    # v6e closes a dim of 16 only.
    assert links.links_of(mesh_of(grid(8, 8, 1), ("a", "b", "c")), "v6e").rings["a"].flows == 2
    assert links.links_of(mesh_of(grid(16, 8, 1), ("a", "b", "c")), "v6e").rings["a"].flows == 1


def test_a_box_of_two_dims_is_a_snake():
    box = grid(4, 4, 1).reshape(16, 1, 3)
    assert links.links_of(mesh_of(box, ("a", "b")), "v6e").rings["a"].flows == 1


def test_two_devices_of_a_chip_share_its_links():
    four = np.repeat(grid(4, 1, 1).reshape(4, 1, 3), 2, axis=1)
    together = links.links_of(mesh_of(four.reshape(8, 1, 3), ("a", "b")), "tpu7x")
    assert together.rings["a"] == Ring(size=8, chips=4, flows=1, messages=8)
    apart = links.links_of(mesh_of(four, ("a", "b")), "tpu7x")
    assert apart.rings["a"].flows == 2
    assert apart.rings["b"].chips == 1


def test_between_slices_is_the_network():
    assert LINKS.seconds("all-reduce", ("slices",), 6_250_000_000) == 1.0


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is not installed: '.[tpu]'")
def test_data_takes_the_contiguous_part_of_a_v5p_torus():
    from hunyuan_jax.parallel.mesh import make_mesh

    devices = topology.topology_devices("v5p:4x8x8")
    mesh = make_mesh(MeshConfig(data=-1, expert=16), devices)
    ring = links.links_of(mesh, "v5p").rings["data"]
    assert (ring.size, ring.flows) == (16, 1)


# --- the page


def test_the_page_draws_compute_and_links(tmp_path):
    events = (
        timeline.Event("compute", "expert_gate_up.1", 0.0, 0.004),
        timeline.Event("data", "all-gather", 0.001, 0.002),
        timeline.Event("data", "too short to see", 0.003, 0.003 + 1e-9),
    )
    op = hlo_text.Op("l", "", "while", (), "", 'op_name="transpose(jvp())<"', False, 0)
    loops = (timeline.Loop(op, 32, 0.004, events),)
    report = types.SimpleNamespace(
        timeline=timeline.Timeline(1.0, 0.8, {}, loops, ()),
        topology="v5p:<2>",
        tokens=1000,
        ideal_seconds=0.5,
        compute_seconds=0.8,
        exposed_seconds=0.2,
        all_in_seconds=1.0,
        all_in_share_of_ideal=0.5,
    )
    text = page.write(report, tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "v5p:&lt;2&gt;" in text and "<2>" not in text
    assert "backward loop: one of 32 executions, 4.0 ms" in text
    assert "expert_gate_up.1: 4.00 ms" in text and "all-gather: 1.00 ms" in text
    assert "too short" not in text
    assert "50.0%" in text and "<script" not in text
