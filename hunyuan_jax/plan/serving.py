"""Compiles an engine's programs for a slice on this machine: what fits, and how fast it could be.

Nothing here has run on a TPU: bytes are the compiler's, tokens/s are bounds.
"""

import collections
import dataclasses
import math
import time
from typing import Any

import jax

from hunyuan_jax.config import MeshConfig, ModelConfig
from hunyuan_jax.errors import MeshError
from hunyuan_jax.infer.engine import shapes_of
from hunyuan_jax.infer.pretrained import dropless
from hunyuan_jax.infer.programs import Sources
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.cache import empty_cache
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel import rules
from hunyuan_jax.parallel.mesh import device_kind, make_mesh
from hunyuan_jax.params.abstract import row_major
from hunyuan_jax.params.roles import Role
from hunyuan_jax.plan import aot, hlo, hlo_text, topology
from hunyuan_jax.quant.array import is_quantized
from hunyuan_jax.weights import few_bits
from pallas_kernels import tpu_compiler
from pallas_kernels.chips import Chip

# Of what the weights leave, the share that the cache has in the programs that are compiled.
_CACHE_SHARE = 0.5
# Answers at a time of which a bound is given, and the tokens that each has in the cache.
BATCHES = (1, 16, 64)
CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; bytes are per device.

    temporaries: besides arguments and outputs; kernels: calls of each Pallas kernel, products:
    matrix products by the dtypes that they multiply, both in the text of the program; received:
    bytes of each kind of collective, of one step.
    """

    name: str
    temporaries: int
    kernels: dict[str, int]
    products: dict[str, int]
    received: dict[str, int]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `plan --serve` prints.  Bytes are per device.

    rest: what else stays on a device, such as counts of drawn tokens; token: bytes of a token in
    the cache; num_tokens: tokens of context that fit, of all rows; touched_bytes, tokens_per_s: by
    batch, of the whole slice, see `bound`.
    """

    topology: str
    mesh: dict[str, int]
    quantize: str | None
    hbm: int
    weights: int
    rest: int
    token: float
    programs: tuple[Program, ...]
    num_tokens: int
    touched_bytes: dict[int, int]
    tokens_per_s: dict[int, float]

    @property
    def temporaries(self) -> int:
        """Of the program that needs most."""
        return max(program.temporaries for program in self.programs)


def mesh_of(cfg: ModelConfig, num_devices: int) -> MeshConfig:
    """The mesh of a server: kv heads over `tensor`, experts over `expert`, rows over the rest."""
    tensor = math.gcd(cfg.num_kv_heads, num_devices)
    expert = math.gcd(cfg.moe.num_experts, num_devices // tensor)
    return MeshConfig(data=num_devices // tensor // expert, expert=expert, tensor=tensor)


def report(
    cfg: ModelConfig,
    topology_name: str,
    mesh_config: MeshConfig | None,
    limits: Limits,
    quantize: str | None,
) -> Report:
    """Compiles prefill and decoding for a slice.

    Args:
      mesh_config: None for `mesh_of`.

    Raises:
      ConfigError: no such slice, a method that is not for this model or these devices.
      MeshError: sizes that do not divide over the mesh.
      aot.HbmOverflowError: weights or a program that do not fit.
    """
    few_bits.check_method(cfg, quantize, "--quantize")
    chip = topology.chip_of(topology_name)
    devices = topology.topology_devices(topology_name)
    cfg = dropless(cfg)
    mesh = make_mesh(mesh_config or mesh_of(cfg, len(devices)), devices)
    few_bits.check_product(quantize, device_kind(mesh), "--quantize")
    graph_def, specs = abstract_model(cfg, mesh)
    params = few_bits.abstract(cfg, specs, quantize)
    weights = _device_bytes(params)
    params = jax.tree.map(row_major, params, specs, is_leaf=is_quantized)
    num_pools = rules.num_shards(mesh, "batch")
    shapes = shapes_of(cfg, mesh, limits, num_pools)
    context = min(limits.max_context or cfg.max_position, cfg.max_position)
    num_columns = -(-context // shapes.page_size)
    token = _token_bytes(cfg, mesh, shapes.page_size, limits.cache_dtype)
    left = chip.hbm_bytes - weights
    num_pages = int(left * _CACHE_SHARE / token) // shapes.page_size
    if num_pages < 1:
        raise aot.HbmOverflowError(
            f"{topology_name}: the weights take {weights / 2**30:.1f} GiB of the "
            f"{chip.hbm_bytes / 2**30:.1f} GiB of a device; use a larger slice or --quantize.",
            aot.Overflow(weights, chip.hbm_bytes, ()),
        )
    sources = Sources(
        dict.fromkeys(("chunk", "decode"), graph_def),
        cfg,
        mesh,
        shapes,
        num_pages,
        num_columns,
        limits.cache_dtype,
    )
    state = _abstract_state(sources)
    programs = tuple(
        _compile(sources, name, num_lines, params, state)
        for name, num_lines in (("decode", shapes.rows), ("chunk", shapes.num_pieces[-1]))
    )
    rest = _device_bytes(state._replace(entries={}))
    room = left - rest - max(program.temporaries for program in programs)
    touched = {batch: touched_bytes(cfg, specs, params, batch) for batch in BATCHES}
    return Report(
        topology=topology_name,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        quantize=quantize,
        hbm=chip.hbm_bytes,
        weights=weights,
        rest=rest,
        token=token,
        programs=programs,
        num_tokens=max(0, int(room / token)) * num_pools,
        touched_bytes=touched,
        tokens_per_s={
            batch: bound(cfg, chip, len(devices), batch, num_bytes)
            for batch, num_bytes in touched.items()
        },
    )


def smallest(
    cfg: ModelConfig, generation: str, limits: Limits, quantize: str | None
) -> Report | None:
    """The report of the smallest slice of a generation on which the programs fit, with room for a
    whole context; None if there is none.

    Raises:
      ConfigError: as `report`, whatever the slice.
    """
    context = min(limits.max_context or cfg.max_position, cfg.max_position)
    for shape in topology.SLICES[generation]:
        try:
            found = report(cfg, f"{generation}:{shape}", None, limits, quantize)
        except (aot.HbmOverflowError, MeshError):
            continue
        if found.num_tokens >= context:
            return found
    return None


def touched_bytes(
    cfg: ModelConfig, specs: dict[str, Any], params: dict[str, Any], batch: int
) -> int:
    """Bytes of weights and cache that a step reads of `batch` answers with CONTEXT tokens each.

    An expert is read if a token chooses it: with uniform choices 1 - (1 - k / E)^batch of them.
    Of the table of an untied model a row a token is read.
    """
    share = 1 - (1 - cfg.moe.top_k / cfg.moe.num_experts) ** batch if cfg.is_moe else 1.0
    share_of = {Role.EXPERT: share, Role.EMBEDDING: 1.0 if cfg.tie_embeddings else 0.0}
    shares = jax.tree.map(lambda spec: share_of.get(spec.role, 1.0), specs)
    read = jax.tree.map(
        lambda leaf, share: share * sum(map(num_bytes, jax.tree.leaves(leaf))),
        params,
        shares,
        is_leaf=is_quantized,
    )
    for name in ("mtp", "mtp_groups"):  # does not generate
        read.pop(name, None)
    cache = batch * CONTEXT * count(cfg).kv_bytes_per_token
    return int(sum(jax.tree.leaves(read))) + cache


def bound(cfg: ModelConfig, chip: Chip, num_devices: int, batch: int, touched: int) -> float:
    """Tokens/s if every device reads its share at the speed of its memory, or computes at its
    peak: an upper bound, without any collective.
    """
    read = touched / chip.hbm_bytes_per_s
    compute = 2 * count(cfg).active * batch / chip.peak_flops
    return batch * num_devices / max(read, compute)


def num_bytes(x: Any) -> int:
    """Bytes of an array on a TPU, which packs four-bit integers."""
    bits = 4 if x.dtype == jax.numpy.int4 else 8 * x.dtype.itemsize
    return math.prod(x.shape) * bits // 8


def _device_bytes(tree: Any) -> int:
    """Bytes that a device has of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    shards = (x.update(shape=x.sharding.shard_shape(x.shape)) for x in leaves)
    return sum(map(num_bytes, shards))


def _token_bytes(cfg: ModelConfig, mesh: Any, page_size: int, cache_dtype: str | None) -> float:
    """Bytes that a device has of a token in the cache of a row of its pool."""
    entries = jax.eval_shape(lambda: empty_cache(cfg, 1, page_size, cache_dtype)).entries
    whole = sum(map(num_bytes, jax.tree.leaves(entries))) / page_size
    return whole * rules.num_shards(mesh, "batch") / mesh.size


def _abstract_state(sources: Sources) -> Any:
    shapes = jax.eval_shape(sources.new_state)
    with tpu_compiler.without_cache():
        compiled = jax.jit(sources.new_state).lower().compile()
    return jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding), shapes, compiled.output_shardings
    )


def _compile(sources: Sources, name: str, num_lines: int, params: Any, state: Any) -> Program:
    start = time.perf_counter()
    try:
        with tpu_compiler.without_cache():
            compiled = sources.lower(name, num_lines, (params, None), state).compile()
    except jax.errors.JaxRuntimeError as e:
        overflow = aot.parse_overflow(str(e))
        if overflow is None:
            raise
        raise aot.HbmOverflowError(
            f"{name} of {num_lines} lines needs {overflow.used / 2**30:.1f} GiB of HBM per "
            f"device, of which {overflow.available / 2**30:.1f} GiB are available; use a larger "
            "slice, fewer --max_rows or --quantize.",
            overflow,
        ) from e
    module = hlo_text.parse(compiled.as_text())
    read = hlo.analyse(module, dict(sources.mesh.shape))
    kernels, received = collections.Counter(), collections.Counter()
    for kernel in read.kernels:
        kernels[kernel.name] += kernel.times
    for item in read.collectives:
        received[item.kind] += item.total_bytes
    stats = compiled.memory_analysis()
    temporaries = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    products, seconds = dict(hlo.product_dtypes(module)), time.perf_counter() - start
    return Program(name, temporaries, dict(kernels), products, dict(received), seconds)


def print_report(found: Report) -> None:
    """Prints a report."""
    gib = 2**30
    mesh = ", ".join(f"{axis}:{size}" for axis, size in found.mesh.items())
    print(f"{found.topology}, mesh {mesh}, weights in {found.quantize or 'their numbers'}")
    print("\n| per device | GiB |\n|---|---|")
    for name, size in (
        ("memory", found.hbm),
        ("weights", found.weights),
        ("rows: settings and counts", found.rest),
        *((f"temporaries of {program.name}", program.temporaries) for program in found.programs),
    ):
        print(f"| {name} | {size / gib:,.2f} |")
    print(
        f"\nA token in the cache takes {found.token / 1024:,.1f} KiB of a device; "
        f"{found.num_tokens:,} tokens of context fit on the slice."
    )
    print(
        f"\n| answers, {CONTEXT} tokens each | GiB read a step | tokens/s at most |\n|---|---|---|"
    )
    for batch, size in found.touched_bytes.items():
        print(f"| {batch} | {size / gib:,.1f} | {found.tokens_per_s[batch]:,.0f} |")
    for program in found.programs:
        kernels = ", ".join(f"{name} x {num}" for name, num in program.kernels.items()) or "none"
        products = ", ".join(f"{dtypes}: {num}" for dtypes, num in program.products.items())
        received = ", ".join(f"{kind} {n / gib:,.2f}" for kind, n in program.received.items())
        print(f"\n{program.name}, compiled in {program.compile_seconds:.0f} s; kernels: {kernels}")
        print(f"products by what they multiply: {products or 'none'}")
        print(f"collectives of a call or step, GiB: {received or 'none'}")
