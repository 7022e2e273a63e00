"""Settings of the jax process that a user may have, for tests that they change no result."""

import contextlib
from collections.abc import Iterator

import jax

UNUSUAL = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_numpy_rank_promotion": "raise",
}


@contextlib.contextmanager
def unusual() -> Iterator[None]:
    """All of them at once, for the whole process as environment variables would."""
    before = {name: getattr(jax.config, name) for name in UNUSUAL}
    for name, value in UNUSUAL.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
