"""Finds the best ways to run a config on a slice, and the smallest slice that fits it."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax

from hunyuan_jax.config import Config
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.plan import aot, memory, topology

# Matmul work by remat policy, relative to no recomputation: "full" repeats the forward pass, a
# third of it.
_RECOMPUTE = {"none": 1.0, "dots": 1.0, "full": 4 / 3}
# By falling precision.
_STATE_DTYPES = ("float32", "bfloat16", "fp8_lm")
# Largest ratio between our estimate and the compiler's peak; a config whose estimate exceeds the
# memory by more is not compiled.
_TOLERANCE = 1.1
_REFUSED = "the compiler refuses it: "


@dataclasses.dataclass(frozen=True)
class Trial:
    """One config on one slice.

    estimate: bytes per device by `memory.estimate`; None if the config does not suit the slice.
    outcome: the result in words.
    report: report of the compiled step; None if it was not compiled or does not fit.
    """

    topology: str
    num_devices: int
    config: Config
    estimate: int | None
    outcome: str
    report: aot.Report | None = None


def with_batch(config: Config, num_devices: int, batch_per_chip: int) -> Config:
    """Sets the batch size to `batch_per_chip` sequences per micro-batch and device, or group of
    config.mesh.context devices that share a sequence.
    """
    num_groups = max(1, num_devices // max(1, config.mesh.context))
    batch_size = num_groups * batch_per_chip * config.train.grad_accum_steps
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch_size)
    )


def search(
    config: Config, topology_name: str, batches_per_chip: Sequence[int], compile_top: int
) -> list[Trial]:
    """Returns the ways to run `config` on this slice whose estimate fits, best first.

    Tries all meshes (data x expert x tensor), remat policies, batch sizes and dtypes of the
    optimizer's state.  They are ranked by recomputation, then by the tensor axis, then by the
    bytes exchanged per token, then by the precision of the state.  The first `compile_top` are
    compiled and ranked by all-in seconds a token.

    Raises:
      ConfigError: nothing fits.
    """
    hbm_bytes = topology.chip_of(topology_name).hbm_bytes
    topology.load_compiler()
    num_devices = topology.num_devices(topology_name, config.mesh.num_slices)
    ranked, least = [], math.inf
    for candidate in _candidates(config, num_devices, batches_per_chip):
        try:
            peak = memory.estimate(candidate, num_devices).peak
        except ConfigError:
            continue  # this mesh does not suit the model or the batch
        least = min(least, peak)
        if peak <= hbm_bytes:
            state = _STATE_DTYPES.index(candidate.optimizer.state_dtype)
            # Every shard of the tensor axis repeats the work between the matmuls.
            tensor = candidate.mesh.tensor
            rank = (
                _RECOMPUTE[candidate.model.remat],
                tensor,
                _exchanged_bytes(candidate, num_devices),
                state,
                peak,
            )
            ranked.append(
                (rank, Trial(topology_name, num_devices, candidate, peak, "not compiled"))
            )
    if least == math.inf:
        raise ConfigError(
            f"no mesh over the {num_devices} devices of {topology_name} suits the model and "
            f"{batches_per_chip} sequences per device."
        )
    if not ranked:
        raise ConfigError(
            f"nothing fits on {topology_name}: the leanest way to run the config needs an "
            f"estimated {least / 2**30:.1f} GiB per device, and {hbm_bytes / 2**30:.1f} GiB are "
            "there. Take a larger slice (`plan --fit` finds the smallest)."
        )
    trials = [trial for _, trial in sorted(ranked, key=lambda pair: pair[0])]
    tried = [_compile(trial) for trial in trials[:compile_top]]
    return (
        sorted(
            tried,
            key=lambda trial: (
                trial.report.all_in_seconds / trial.report.tokens if trial.report else math.inf
            ),
        )
        + trials[compile_top:]
    )


def fit(config: Config, generations: Sequence[str], batch_per_chip: int) -> list[Trial]:
    """Tries each generation's slices, by size, up to the smallest on which the config trains.

    The config's mesh is kept; its -1 axis and the batch grow with the slice.

    Returns:
      One Trial per slice tried.
    """
    topology.load_compiler()
    return list(
        itertools.chain.from_iterable(
            _fit_one(config, generation, batch_per_chip) for generation in generations
        )
    )


def _fit_one(config: Config, generation: str, batch_per_chip: int) -> Iterator[Trial]:
    for shape in topology.SLICES[generation]:
        name = f"{generation}:{shape}"
        num_devices = topology.num_devices(name, config.mesh.num_slices)
        scaled = config
        try:
            scaled = with_batch(config, num_devices, batch_per_chip)
            peak = memory.estimate(scaled, num_devices).peak
        except ConfigError as e:
            yield Trial(name, num_devices, scaled, None, str(e))
            continue
        if peak > _TOLERANCE * topology.chip_of(name).hbm_bytes:
            yield Trial(name, num_devices, scaled, peak, "too little memory, by estimate")
            continue
        trial = _compile(Trial(name, num_devices, scaled, peak, "not compiled"))
        yield trial
        if trial.report or trial.outcome.startswith(_REFUSED):
            return  # a kernel that this generation cannot compile fails on more chips too


def _compile(trial: Trial) -> Trial:
    try:
        report = aot.report(trial.config, trial.topology)
    except ConfigError as e:
        return dataclasses.replace(trial, outcome=str(e))
    except jax.errors.JaxRuntimeError as e:
        return dataclasses.replace(trial, outcome=_REFUSED + str(e).splitlines()[0])
    return dataclasses.replace(trial, outcome="fits", report=report)


def _candidates(
    config: Config, num_devices: int, batches_per_chip: Sequence[int]
) -> Iterator[Config]:
    replica = max(config.mesh.replica, config.mesh.num_slices)
    ways = [n for n in range(1, num_devices // replica + 1) if num_devices // replica % n == 0]
    experts = [n for n in ways if config.model.moe.num_experts % n == 0]
    for expert, tensor, remat, batch, state_dtype in itertools.product(
        experts, ways, _RECOMPUTE, batches_per_chip, _STATE_DTYPES
    ):
        if num_devices // replica % (expert * tensor) == 0:
            mesh = dataclasses.replace(
                config.mesh, replica=replica, data=-1, expert=expert, tensor=tensor
            )
            model = dataclasses.replace(config.model, remat=remat)
            optimizer = dataclasses.replace(config.optimizer, state_dtype=state_dtype)
            candidate = dataclasses.replace(config, mesh=mesh, model=model, optimizer=optimizer)
            try:
                yield with_batch(candidate, num_devices, batch)
            except ConfigError:
                continue  # this batch does not hold whole routing groups


def _exchanged_bytes(config: Config, num_devices: int) -> float:
    """Returns the bytes that a device exchanges per token of its batch.

    A layer's weights are gathered for the forward and the backward pass, and their gradients are
    sent once.  A token's row goes to its expert and back in both passes, and is summed over the
    tensor axis twice in each.
    """
    sizes = memory.sizes_of(config, num_devices)
    model = config.model
    weights = (
        max(0, model.num_layers * memory.layer_weights(sizes) - sizes.parameters) * sizes.element
    )
    rows = 4 * sizes.rows if sizes.expert_ways > 1 else 0
    summed = 8 * sizes.tokens if sizes.tensor_ways > 1 else 0
    activations = (rows + summed) * model.hidden_size * model.num_layers * sizes.element
    return sizes.num_micro_batches * (3 * weights + activations) / sizes.batch_tokens
