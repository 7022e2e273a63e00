"""Memory of one device by line item, from the config and the mesh sizes alone: no device, nothing
compiled.

The state's items are exact (its shapes and shardings, traced); those of the step are the formulas
below, each a function of `Sizes`, written down for the program as it is built today and compared
with the compiler's peak by `plan`. Letters: D model, N query heads, K kv heads, H head dim, F ffn,
E experts, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from hunyuan_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from hunyuan_jax.layers import embedding, loss
from hunyuan_jax.layers.facts import DTYPE_BYTES
from hunyuan_jax.layers.ffn.moe import routing
from hunyuan_jax.layers.mixer import context_facts
from hunyuan_jax.layers.mixer.context_facts import Form
from hunyuan_jax.model.layout import group_layout
from hunyuan_jax.parallel.mesh import AXES, resolve_sizes
from hunyuan_jax.parallel.rules import RULES, first_that_divides
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import Program, build_program

# Arrays of the size of one part's float32 logits that are alive at once: the logits, and their
# gradient.
_LOGIT_COPIES = 2
# Layers whose gathered weights are alive at once, read off the buffers alive at the peak of the
# compiled a52b step (v5p:4x8x8, libtpu 0.0.50.1, 2026-11).
_GATHERED_LAYERS = 1

# When an item is alive.
ALWAYS, LAYERS, LOSS, UPDATE = "always", "backward pass of the layers", "loss", "update"


@dataclasses.dataclass(frozen=True)
class Item:
    """bytes: per device; phase: when it is alive, one of ALWAYS, LAYERS, LOSS, UPDATE."""

    name: str
    bytes: int
    phase: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Line items; the peak is what is always there and the largest of the phases."""

    items: tuple[Item, ...]

    def in_phase(self, phase: str) -> int:
        """Bytes per device alive in this phase only."""
        return sum(item.bytes for item in self.items if item.phase == phase)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most memory."""
        return max((LAYERS, LOSS, UPDATE), key=self.in_phase)

    @property
    def peak(self) -> int:
        """Bytes per device."""
        return self.in_phase(ALWAYS) + self.in_phase(self.peak_phase)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes per device that the formulas need of a config on a mesh.

    batch_bytes, batch_tokens: of the whole batch.
    tokens: of one micro-batch; a step has num_micro_batches of them.
    rows: of the expert buffers: tokens * top_k and the slack of their capacity.
    chunk_rows: rows of the vocabulary in one chunk of the loss.
    expert_ways, tensor_ways: sizes of those mesh axes.
    parameters: elements.
    """

    model: ModelConfig
    batch_bytes: int
    batch_tokens: int
    tokens: int
    num_micro_batches: int
    rows: int
    chunk_rows: int
    expert_ways: int
    tensor_ways: int
    parameters: int

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return DTYPE_BYTES[self.model.dtype]


def mesh_sizes(config: Config, num_devices: int) -> dict[str, int]:
    """Axis sizes in mesh order, -1 replaced.

    Raises:
      ConfigError: they do not multiply to the number of devices.
    """
    return dict(zip(AXES, resolve_sizes(config.mesh, num_devices), strict=True))


def estimate(config: Config, num_devices: int) -> Estimate:
    """Line items of the train step.

    Raises:
      ConfigError: the mesh does not fit the devices, or a dim of a parameter or of the batch does
        not divide over it.
    """
    sizes, state = sizes_of(config, num_devices), _state_of(config, num_devices)
    kept = kept_activations(sizes)
    constants = build_objective(config).constants(state.program.mesh)
    # With several passes a step, their sum in float32 besides those of one pass.
    gradients = state.gradients + (4 * state.parameters if sizes.num_micro_batches > 1 else 0)
    return Estimate(
        (
            Item("weights", state.weights, ALWAYS),
            Item("optimizer state", state.moments, ALWAYS),
            Item("batch", sizes.batch_bytes, ALWAYS),
            *(Item(name, _bytes(tree), ALWAYS) for name, tree in constants.items()),
            Item("gradients", gradients, LAYERS),
            Item("kept for the backward pass", kept, LAYERS),
            Item("gathered weights", gathered_weights(sizes), LAYERS),
            Item("activations of a group", group_activations(sizes), LAYERS),
            *(
                Item("keys and values of whole rows", form.held_bytes, LAYERS)
                for form in context_forms(config, num_devices)[:1]
            ),
            Item("kept for the backward pass", kept, LOSS),
            Item("gathered vocabulary", gathered_vocabulary(sizes), LOSS),
            Item("logits", logits(sizes), LOSS),
            Item("gradients", gradients, UPDATE),
        )
    )


def sizes_of(config: Config, num_devices: int) -> Sizes:
    """What the formulas need; raises like `estimate`."""
    mesh = MeshConfig(**mesh_sizes(config, num_devices))
    state = _state_of(config, num_devices)
    objective = build_objective(config)
    batch = step_lib.abstract_batch(state.program._replace(config=config, objective=objective))
    tokens_BT = batch["tokens"]
    rows = math.prod(tokens_BT.sharding.shard_shape(tokens_BT.shape))
    batch_tokens = math.ceil(rows / mesh.context)
    tokens = math.ceil(batch_tokens / config.train.grad_accum_steps)
    return Sizes(
        model=config.model,
        batch_bytes=_bytes([batch[name] for name in objective.batch_spec]),
        batch_tokens=batch_tokens,
        tokens=tokens,
        num_micro_batches=config.train.grad_accum_steps,
        rows=_expert_rows(config, tokens),
        chunk_rows=_chunk_rows(config, tokens, mesh),
        expert_ways=mesh.expert,
        tensor_ways=mesh.tensor,
        parameters=state.parameters,
    )


def context_forms(config: Config, num_devices: int) -> tuple[Form, ...]:
    """Returns what the forms of attention over the chips of a row cost, that of the step first;
    () if a row is on one chip.

    Raises:
      ConfigError: the form that config.model.context_attention names cannot be used.
    """
    mesh = MeshConfig(**mesh_sizes(config, num_devices))
    if mesh.context == 1:
        return ()
    train = config.train
    ways = train.grad_accum_steps * mesh.replica * mesh.data * mesh.expert
    sizes = (train.batch_size // ways, train.seq_len, mesh.context, mesh.tensor)
    chosen = context_facts.choose(config.model, *sizes)
    forms = context_facts.forms(config.model, *sizes)
    return (chosen, *(form for form in forms if form != chosen))


def kept_activations(sizes: Sizes) -> int:
    """Bytes that the forward pass keeps for the backward pass: the residual stream [tokens, D] of
    every layer, and what the remat policy keeps of the layer's inside.

    Without remat the forward pass keeps everything, the gathered weights included.
    """
    model = sizes.model
    stream = sizes.tokens * model.hidden_size * sizes.element
    inside = {
        "full": 0,
        "dots": _products(sizes),
        "none": _products(sizes) + _elementwise(sizes) + gathered_weights(sizes),
    }[model.remat]
    return model.num_layers * (stream + inside)


def group_activations(sizes: Sizes) -> int:
    """Bytes that the backward pass of one CLA group works on: the recomputed activations of its
    layers, and the gradients of one layer.

    What the remat policy keeps is in `kept_activations` already.
    """
    layer = _products(sizes) + _elementwise(sizes)
    recomputed = {"full": layer, "dots": _elementwise(sizes), "none": 0}[sizes.model.remat]
    return sizes.model.cla_share_factor * recomputed + _backward(sizes)


def gathered_weights(sizes: Sizes) -> int:
    """Bytes of the gathered weights, in the compute dtype, of the layers that run at one time."""
    return _GATHERED_LAYERS * layer_weights(sizes) * sizes.element


def layer_weights(sizes: Sizes) -> int:
    """Elements of one layer's gathered weights, the mean over layers."""
    return math.ceil(_layer_mean(sizes, "weights"))


def gathered_vocabulary(sizes: Sizes) -> int:
    """Bytes of one vocabulary chunk of the [V, D] head, in the compute dtype, and its gradient."""
    return 2 * sizes.chunk_rows * sizes.model.hidden_size * sizes.element


def logits(sizes: Sizes) -> int:
    """Bytes of one chunk's float32 logits and their copies, and of the float32 sum of the hidden
    states' gradients.
    """
    return 4 * sizes.tokens * (_LOGIT_COPIES * sizes.chunk_rows + sizes.model.hidden_size)


def _products(sizes: Sizes) -> int:
    """Bytes per layer of what remat "dots" keeps."""
    return math.ceil(_layer_mean(sizes, "products"))


def _elementwise(sizes: Sizes) -> int:
    """Bytes per layer of the other activations: two norms, the residual sums, the output of the
    feed-forward network, and what mixer and feed-forward network declare.
    """
    stream = 5 * sizes.tokens * sizes.model.hidden_size * sizes.element
    return math.ceil(stream + _layer_mean(sizes, "elementwise"))


def _backward(sizes: Sizes) -> int:
    """Bytes per layer of the backward pass besides those of the forward pass."""
    return math.ceil(_layer_mean(sizes, "backward"))


def _layer_mean(sizes: Sizes, field: str) -> float:
    """The mean over layers of a field of `Activations`."""
    found = []
    for stack in sizes.model.stacks.values():
        layers = group_layout(stack)
        parts = [part for layer in layers for part in layer.activation_bytes(stack, sizes)]
        mean = sum(getattr(part, field) for part in parts) / len(layers)
        found.append((mean, stack.num_layers))
    return sum(mean * number for mean, number in found) / sum(number for _, number in found)


def _expert_rows(config: Config, tokens: int) -> int:
    """Rows that a device's experts compute.  With a capacity the buffers have that many slots,
    used or not.
    """
    moe = config.model.moe
    if not config.model.is_moe:
        return 0
    if moe.dispatch == "dropless":
        return tokens * moe.top_k
    group_size = routing.group_size(
        moe, config.train.batch_size // config.train.grad_accum_steps, config.train.seq_len
    )
    return math.ceil(tokens / group_size * routing.capacity(moe, group_size) * moe.num_experts)


def _chunk_rows(config: Config, tokens: int, mesh: MeshConfig) -> int:
    """Rows of the table in one vocabulary chunk, gathered from storage."""
    axes = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
    table = (config.model.vocab_size, config.model.hidden_size)
    storage_ways = _storage_ways(
        mesh, first_that_divides(axes, table, embedding.TABLES, "the table of tokens")[0]
    )
    stored = config.model.vocab_size // mesh.tensor // storage_ways
    return loss.rows_of_chunk(stored, loss.num_chunks(tokens, stored, storage_ways)) * storage_ways


def _storage_ways(mesh: MeshConfig, logical: str) -> int:
    return math.prod(getattr(mesh, axis) for axis in RULES[logical].storage)


@dataclasses.dataclass(frozen=True)
class _State:
    """Per device: bytes of weights, optimizer state and gradients, and the number of parameters;
    program: what they belong to.
    """

    weights: int
    moments: int
    gradients: int
    parameters: int
    program: Program


def _state_of(config: Config, num_devices: int) -> _State:
    """Exact, from the shapes and shardings of the train state."""
    # Only what the state depends on, so that a search over other settings traces it once.
    moe = dataclasses.replace(config.model.moe, group_size=0)
    relevant = Config(
        model=dataclasses.replace(config.model, remat="none", moe=moe),
        mesh=MeshConfig(**mesh_sizes(config, num_devices)),
        optimizer=config.optimizer,
        train=TrainConfig(seq_len=1, ema_decay=config.train.ema_decay),  # fits every model
    )
    return _trace_state(relevant, num_devices)


@functools.lru_cache(maxsize=256)
def _trace_state(config: Config, num_devices: int) -> _State:
    program = build_program(
        config, AbstractMesh(tuple(mesh_sizes(config, num_devices).values()), AXES)
    )
    state = program.state
    elements = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(program.taps)
    ]
    return _State(
        _bytes((state.params, state.ema)),
        _bytes(state.opt_state),
        _bytes(program.taps),
        sum(elements),
        program,
    )


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
