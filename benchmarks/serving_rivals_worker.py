"""Other engines' side of benchmarks/serving.py, which runs it in their environments.

Reads a job from standard input; prints, on the last line, the tokens of its parity prompts and the
seconds at which each token of each request of its trace came.
"""

import json
import sys
import time
from pathlib import Path

PARITY_TOKENS = 64
# Requests that `static` generates together, in the order of arrival.
STATIC_BATCH = 16


def continuous(folder: str):
    """transformers' continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Its default takes most of the machine's memory.
    limits = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1024)

    def serve(requests):
        manager = model.init_continuous_batching(
            generation_config=config, continuous_batching_config=limits
        )
        manager.start()
        start, num_added, done = time.perf_counter(), 0, {}
        while len(done) < len(requests):
            now = time.perf_counter() - start
            while num_added < len(requests) and requests[num_added][0] <= now:
                _, ids, num_new = requests[num_added]
                manager.add_request(
                    ids,
                    request_id=str(num_added),
                    max_new_tokens=num_new,
                    record_timestamps=True,
                )
                num_added += 1
            result = manager.get_result(timeout=0.002)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done[int(result.request_id)] = result
        manager.stop(block=True)
        results = [done[i] for i in range(len(requests))]
        times = [[stamp - start for stamp in result.timestamps] for result in results]
        return times, [list(result.generated_tokens) for result in results]

    return serve


def static(folder: str):
    """transformers' `generate` on batches of those that have arrived; the tokens of a batch come
    together.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def serve(requests):
        start, times, tokens = time.perf_counter(), [], []
        while len(times) < len(requests):
            now = time.perf_counter() - start
            batch = [r for r in requests[len(times) :] if r[0] <= now][:STATIC_BATCH]
            if not batch:
                time.sleep(1e-3)
                continue
            longest = max(len(ids) for _, ids, _ in batch)
            ids = torch.tensor([[0] * (longest - len(ids)) + ids for _, ids, _ in batch])
            mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for _, i, _ in batch])
            num_new = max(num for *_, num in batch)
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
            now = time.perf_counter() - start
            for row, (*_, num) in zip(out[:, longest:].tolist(), batch, strict=True):
                times.append([now] * num)
                tokens.append(row[:num])
        return times, tokens

    return serve


def mlx(folder: str):
    """mlx-lm's batch generator."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)

    def serve(requests):
        generator = BatchGenerator(model, completion_batch_size=64)
        start, num_added = time.perf_counter(), 0
        times, tokens = [[] for _ in requests], [[] for _ in requests]
        place_of, num_left = {}, len(requests)
        while num_left:
            now = time.perf_counter() - start
            while num_added < len(requests) and requests[num_added][0] <= now:
                _, ids, num_new = requests[num_added]
                (uid,) = generator.insert([ids], [num_new])
                place_of[uid] = num_added
                num_added += 1
            _, responses = generator.next()
            now = time.perf_counter() - start
            for response in responses:
                times[place_of[response.uid]].append(now)
                tokens[place_of[response.uid]].append(response.token)
                num_left -= response.finish_reason is not None
        return times, tokens

    return serve


def main(kind: str, *folder: str) -> None:
    """Prints one JSON line; "write" writes a model instead."""
    if kind == "write":
        from transformers_worker import new_model

        new_model("bench", eos_token_id=2).save_pretrained(*folder)
        return
    job = json.loads(sys.stdin.read())
    serve = {"continuous": continuous, "static": static, "mlx": mlx}[kind](job["folder"])
    parity = [serve([(0.0, ids, PARITY_TOKENS)])[1][0] for ids in job["parity"]]
    serve(job["trace"][:8])
    times, _ = serve(job["trace"])
    print(json.dumps({"parity": parity, "times": times}))


if __name__ == "__main__":
    main(*sys.argv[1:])
