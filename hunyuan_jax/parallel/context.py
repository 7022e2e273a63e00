"""Which tokens of a row a chip holds: the order of tokens over the mesh axis `context`.

A row of T tokens is cut into 2 C chunks for C chips, and chip i holds chunks i and 2 C - 1 - i.
Causal attention then costs every chip the same.  `to_chips` reorders a row's ids, positions and
segments once, before the embedding; what is computed per token does not notice.  Attention
(`layers/mixer/ring.py`) and the numbers of the routing groups are the exceptions.

Letters: B batch, T tokens of a row, C chips of the axis, c tokens of a chunk.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.parallel import island, rules

AXIS = "context"


def num_chips(mesh: Mesh | AbstractMesh) -> int:
    """Returns C, the number of chips that a row is spread over."""
    return mesh.shape[AXIS]


def to_chips(x_BT: jax.Array, mesh: Mesh, *rest: str) -> jax.Array:
    """Returns an array [B, T, ...] in the order of the chips, split over them; a single token is
    whole on each.

    rest: logical names of further dims.

    Raises:
      ConfigError: T does not divide into the chunks.
    """
    C = num_chips(mesh)
    if C == 1 or x_BT.shape[1] == 1:
        return x_BT
    check_length(x_BT.shape[1], C)
    return rules.constrain(chip_order(x_BT, C), mesh, ("batch", "seq", *rest))


def from_chips(x_BT: jax.Array, mesh: Mesh, *rest: str) -> jax.Array:
    """Returns an array [B, T, ...] in the order of the row, gathered along T; the inverse of
    `to_chips`.

    rest: logical names of further dims.
    """
    C = num_chips(mesh)
    if C == 1 or x_BT.shape[1] == 1:
        return x_BT
    return row_order(rules.constrain(x_BT, mesh, ("batch", "row", *rest)), C)


def check_length(length: int, num_chips: int) -> None:
    """Raises ConfigError unless a row of `length` tokens divides into two chunks a chip."""
    chunks = 2 * num_chips
    if length % chunks:
        above = -(-length // chunks) * chunks
        lengths = " or ".join(str(n) for n in (above - chunks, above) if n)
        sizes = [n for n in range(1, num_chips + 1) if length % (2 * n) == 0 or n == 1]
        raise ConfigError(
            f"a row of {length} tokens does not divide into the {chunks} chunks of "
            f"config.mesh.context = {num_chips}, two a chip; use a length of {lengths} tokens, or "
            f"a config.mesh.context from {sizes}."
        )


def refuse(mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raises ConfigError if rows are spread over chips, which `what` cannot use."""
    if num_chips(mesh) > 1:
        raise ConfigError(
            f"config.mesh.context = {num_chips(mesh)} spreads a row over chips, which {what} "
            "cannot use; set it to 1."
        )


def row_order(x_BT: jax.Array, num_chips: int) -> jax.Array:
    """Returns an array [B, T, ...] that is whole, from the order of the chips, in that of the row.

    Made of slices and a reversal: the transpose of an indexed read would be a scatter.
    """
    B, T, *rest = x_BT.shape
    x_BC2c = x_BT.reshape(B, num_chips, 2, T // (2 * num_chips), *rest)
    early, late = x_BC2c[:, :, 0], x_BC2c[:, ::-1, 1]
    return jnp.concatenate([early, late], axis=1).reshape(x_BT.shape)


def chip_order(x_BT: jax.Array, num_chips: int) -> jax.Array:
    """Inverse of `row_order`."""
    B, T, *rest = x_BT.shape
    chunks = x_BT.reshape(B, 2 * num_chips, T // (2 * num_chips), *rest)
    early, late = chunks[:, :num_chips], chunks[:, num_chips:][:, ::-1]
    return jnp.stack([early, late], axis=2).reshape(x_BT.shape)


def chunks_here() -> tuple[jax.Array, jax.Array]:
    """Returns the numbers of this chip's two chunks, int32.  Runs inside an island."""
    chip = island.shard_index("seq")
    return chip, 2 * island.num_shards("seq") - 1 - chip


def parts_here(num_parts: int) -> jax.Array:
    """Returns where this chip's tokens stand: for each of `num_parts` equal parts of them, its
    number among all such parts of the row, int32.  Runs inside an island.

    Parts are whole pieces of a chunk, so num_parts is even where there are several chips.
    """
    if island.num_shards("seq") == 1:
        return jnp.arange(num_parts)
    per_chunk = num_parts // 2
    return jnp.concatenate([chunk * per_chunk + jnp.arange(per_chunk) for chunk in chunks_here()])


def halves(x_BT: jax.Array) -> Sequence[jax.Array]:
    """Splits a chip's tokens [B, 2 c, ...] into those of its two chunks, [B, c, ...]."""
    return jnp.split(x_BT, 2, axis=1)
