"""What attention over the chips of a row costs (`layers/mixer/ring.py`), and which form is taken.
Imports no jax.

Letters: C chips of the mesh axis `context`, K kv heads, N query heads, H head dim.
"""

import dataclasses

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers.facts import DTYPE_BYTES

# Bytes of keys, values and their gradients that `auto` lets a chip hold for one group of layers.
MAX_HELD_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of attention over several chips.

    name: a value of config.model.context_attention.
    sent_bytes: that a chip sends in a training step for one group of layers and one micro-batch.
    held_bytes: that it holds of keys, values and their gradients meanwhile.
    refusal: why it cannot be used; "" if it can.
    """

    name: str
    sent_bytes: int
    held_bytes: int
    refusal: str = ""


def forms(
    cfg: ModelConfig, num_rows: int, row_len: int, num_chips: int, num_tensor: int
) -> tuple[Form, ...]:
    """Returns what each form costs.

    Args:
      cfg: the model.
      num_rows: rows of a micro-batch on one chip, each of which it holds a part of.
      row_len: tokens of a row.
      num_chips: C.
      num_tensor: size of the mesh axis `tensor`, which splits the heads.
    """
    C, layers, element = num_chips, cfg.cla_share_factor, DTYPE_BYTES[cfg.dtype]
    # Of the tokens that one chip has.
    keys = 2 * num_rows * row_len // C * cfg.num_kv_heads // num_tensor * cfg.head_dim
    queries = num_rows * row_len // C * cfg.num_heads // num_tensor * cfg.head_dim
    forward_passes = 1 if cfg.remat == "none" else 2  # of what is not kept
    attention_passes = 2 if cfg.remat == "full" else 1
    gather = keys * element * (C - 1)
    # Keys and values forwards; those and their float32 gradients backwards.
    ring = keys * C * (element * attention_passes + element + 4)
    exchange = (keys + 2 * queries * layers) * element * (C - 1) // C
    kv_heads = cfg.num_kv_heads // num_tensor
    return (
        Form("gather", gather * (forward_passes + 1), keys * C * 2 * (element + 2)),
        Form(
            "ring",
            ring * layers,
            keys * (2 * element + 8),
            "it has no dropout of attention weights (config.model.attention_dropout)"
            if cfg.attention_dropout
            else "",
        ),
        Form(
            "all_to_all",
            exchange * (forward_passes + 1),
            (keys + 2 * queries) * 2 * element,
            f"{kv_heads} kv heads on a chip (config.model.num_kv_heads = {cfg.num_kv_heads}, "
            f"config.mesh.tensor = {num_tensor}) do not divide over config.mesh.context = {C}"
            if kv_heads % C
            else "",
        ),
    )


def choose(cfg: ModelConfig, num_rows: int, row_len: int, num_chips: int, num_tensor: int) -> Form:
    """Returns the form that config.model.context_attention names; for "auto", of those that can be
    used and hold at most MAX_HELD_BYTES, the one that sends least, and the ring if none fits.

    Args: as `forms`.

    Raises:
      ConfigError: the form that is named cannot be used.
    """
    by_name = {form.name: form for form in forms(cfg, num_rows, row_len, num_chips, num_tensor)}
    if cfg.context_attention != "auto":
        form = by_name[cfg.context_attention]
        if form.refusal:
            usable = [repr(name) for name, other in by_name.items() if not other.refusal]
            raise ConfigError(
                f"config.model.context_attention = {form.name!r}: {form.refusal}; use 'auto' or "
                f"{' or '.join(usable)}."
            )
        return form
    usable = [form for form in by_name.values() if not form.refusal]
    fitting = [form for form in usable if form.held_bytes <= MAX_HELD_BYTES]
    if fitting:
        return min(fitting, key=lambda form: form.sent_bytes)
    return min(usable, key=lambda form: form.held_bytes)
