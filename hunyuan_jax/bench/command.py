"""The command `bench`."""

from hunyuan_jax import flags

_NUM_STEPS = flags.Option("num_steps", int, "Steps to time.", 20, minimum=1)


@flags.command(flags.CONFIG, flags.JSON, _NUM_STEPS)
def bench(values) -> int:
    """Measures training and prefill speed, compile time and peak memory on this machine."""
    from hunyuan_jax.bench import speed

    flags.print_result(speed.bench(values.config, values.num_steps), values.json)
    return 0
