"""Measures what a checkpoint costs the training loop at the size of configs/tiny.py: how long it
waits for `Store.save`, and how much longer steps take while the save goes on in the background.

JAX_PLATFORMS=cpu python benchmarks/save_stall.py
"""

import statistics
import tempfile
import time

import jax

from hunyuan_jax import presets
from hunyuan_jax.checkpoint import manifest
from hunyuan_jax.checkpoint.store import Store
from hunyuan_jax.config import CheckpointConfig, Config, TrainConfig
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import build_program, init_state, to_items

NUM_PAIRS = 12
WINDOW = 6  # steps: a save is over before they are


def main() -> None:
    """Prints one row.  Windows of steps that begin with a save alternate with windows without."""
    config = Config(
        model=presets.tiny(),
        train=TrainConfig(batch_size=8, seq_len=256),
        checkpoint=CheckpointConfig(keep=2),
    )
    program = build_program(config, single_device_mesh())
    batch = step_lib.place_batch(program, program.objective.random_batch())
    state, step = init_state(program), 0
    train_step = step_lib.make_train_step(program).lower(state, batch).compile()
    calls, windows, single = [], ([], []), []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, config.checkpoint, print)
        for pair in range(NUM_PAIRS + 1):  # the first one warms up
            for is_saving in (False, True) if pair % 2 else (True, False):
                start = time.perf_counter()
                if is_saving:
                    store.save(
                        step, to_items(state), manifest.facts(config, program.mesh.shape, {}, None)
                    )
                    calls.append(time.perf_counter() - start)
                for _ in range(WINDOW):
                    before, step = time.perf_counter(), step + 1
                    state, metrics = train_step(state, batch)
                    jax.block_until_ready(metrics)
                    if not is_saving:
                        single.append(time.perf_counter() - before)
                windows[is_saving].append(time.perf_counter() - start)
                store.wait()
        save_seconds = store.save_seconds
        store.close()
    step_seconds = statistics.median(single)
    stall = statistics.median(calls[1:])
    extra = [
        with_save - without
        for without, with_save in zip(windows[0][1:], windows[1][1:], strict=True)
    ]
    first, median, third = statistics.quantiles(extra, n=4)
    print(
        "| step, ms | the call, ms | of a step | extra over the window, ms | quartiles, ms | "
        "whole save, ms |\n|---|---|---|---|---|---|"
    )
    print(
        f"| {1e3 * step_seconds:.0f} | {1e3 * stall:.1f} | {stall / step_seconds:.1%} | "
        f"{1e3 * median:.0f} | "
        f"{1e3 * first:.0f} to {1e3 * third:.0f} | {1e3 * save_seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
