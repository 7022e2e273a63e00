"""The settings of jax that a run's numbers depend on, stated instead of taken from the process."""

import contextlib
from collections.abc import Iterator

import jax

from hunyuan_jax.errors import ConfigError

PRNG = "threefry2x32"  # the same draws on any mesh and device, unlike "rbg"


@contextlib.contextmanager
def stated() -> Iterator[None]:
    """Computes inside with the settings below, whatever JAX_* variables or `jax.config` say.

    Dtypes have 32 bits; random keys are threefry, drawn alike on any mesh; broadcasting over ranks
    is allowed.  `jax_default_matmul_precision` stays the user's: it trades speed for accuracy on
    purpose.  It acts in this thread only; do not yield inside.

    Raises:
      ConfigError: a setting that changes the draws and cannot be replaced here.
    """
    if jax.config.jax_random_seed_offset:
        raise ConfigError(
            f"JAX_RANDOM_SEED_OFFSET = {jax.config.jax_random_seed_offset} would change every "
            "draw; unset it and change config.train.seed, or the sampling seed."
        )
    with (
        jax.enable_x64(False),
        jax.default_prng_impl(PRNG),
        jax.threefry_partitionable(True),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
