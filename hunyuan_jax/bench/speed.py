"""How fast this machine trains and prefills a configuration, on random tokens: `python -m
hunyuan_jax bench`.
"""

import resource
import statistics
import time
from typing import Any

import jax

from hunyuan_jax.config import Config
from hunyuan_jax.infer.engine import Engine
from hunyuan_jax.infer.pretrained import dropless
from hunyuan_jax.infer.request import Limits, Request
from hunyuan_jax.infer.settings import Sampling
from hunyuan_jax.model.count import count
from hunyuan_jax.parallel.mesh import make_mesh
from hunyuan_jax.post.build import build_objective
from hunyuan_jax.quant.scaled import load_params
from hunyuan_jax.train import step as step_lib
from hunyuan_jax.train.state import abstract_model, build_program, init_state
from pallas_kernels import chips


def bench(config: Config, num_steps: int) -> dict[str, Any]:
    """Medians over `num_steps` steps of the real train step, and of prefills of the same batch.

    Returns steps_per_second, tokens_per_second, prefill_tokens_per_second, compile_seconds,
    peak_memory_mb (of this process), parameters, device, and mfu where the device's peak is known.
    """
    program = build_program(config, make_mesh(config.mesh), build_objective)
    state = init_state(program)
    batch = step_lib.place_batch(program, program.objective.random_batch())
    start = time.perf_counter()
    train_step = step_lib.make_train_step(program).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start

    seconds = []
    for _ in range(num_steps + 2):  # the first two warm up
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    seconds_per_step = statistics.median(seconds[2:])
    counts = count(config.model, config.train.seq_len)
    tokens = config.train.batch_size * config.train.seq_len
    peak = chips.peak_flops(program.mesh.devices.flat[0].device_kind)
    return {
        "device": program.mesh.devices.flat[0].device_kind,
        "num_devices": program.mesh.size,
        "parameters": counts.total,
        "steps_per_second": 1 / seconds_per_step,
        "tokens_per_second": tokens / seconds_per_step,
        "prefill_tokens_per_second": prefill_tokens_per_second(
            config, program, state.params, num_steps
        ),
        "compile_seconds": compile_seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **(
            {
                "mfu": counts.flops_per_token
                * tokens
                / seconds_per_step
                / (peak * program.mesh.size)
            }
            if peak
            else {}
        ),
    }


def prefill_tokens_per_second(config: Config, program: Any, params: Any, num_runs: int) -> float:
    """Returns the median speed at which a batch of prompts, of the length of a training sequence,
    is run into a cache and its first new tokens are drawn.
    """
    model = dropless(config.model)
    graph_def = abstract_model(model, program.mesh)[0]
    # One position is left for the token that is drawn.
    longest = min(config.train.seq_len, model.max_position - 1)
    tokens_BS = program.objective.random_batch()["tokens"][:, :longest]
    limits = Limits(max_rows=len(tokens_BS), max_context=tokens_BS.shape[1] + 1)
    engine = Engine(graph_def, load_params(params, model.dtype), limits)
    sampling = Sampling(max_new_tokens=1, temperature=0, stop_ids=()).resolved({})
    seconds = []
    for run in range(num_runs + 2):
        # A salt for each run, so that no run finds the pages of another.
        requests = [
            Request(str(row), tuple(tokens_S), sampling, cache_salt=f"{run} {row}")
            for row, tokens_S in enumerate(tokens_BS.tolist())
        ]
        start = time.perf_counter()
        for _ in engine.run(requests):
            pass
        seconds.append(time.perf_counter() - start)
    return tokens_BS.size / statistics.median(seconds[2:])
