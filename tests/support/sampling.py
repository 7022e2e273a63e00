"""Sampling settings of rows, for tests of what reads them."""

import jax.numpy as jnp

from hunyuan_jax.infer.sampling import RowSettings

OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 0,
    "choice": 0,
    "num_drawn": 0,
    "min_new": 0,
    "adjusts": True,
}


def row_settings(num_rows: int = 1, stop_ids: tuple[int, ...] = (), **settings) -> RowSettings:
    """The same settings for every row, or a list with one for each; what is not given is off."""
    values = {
        name: jnp.broadcast_to(jnp.asarray(value), (num_rows,))
        for name, value in (OFF | settings).items()
    }
    stop_BW = jnp.broadcast_to(
        jnp.asarray((*stop_ids, 2**31 - 1), jnp.int32), (num_rows, len(stop_ids) + 1)
    )
    return RowSettings(stop_BW=stop_BW, **values)
