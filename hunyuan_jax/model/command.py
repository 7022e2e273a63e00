"""The command `count`."""

import dataclasses

from hunyuan_jax import flags


@flags.command(flags.CONFIG, flags.JSON)
def count(values) -> int:
    """Counts parameters (total, active), training FLOPs and KV cache bytes per token."""
    from hunyuan_jax.model import count as count_lib

    counts = count_lib.count(values.config.model, values.config.train.seq_len)
    flags.print_result(dataclasses.asdict(counts), values.json)
    return 0
