"""Measures training and prefill speed of transformers' HunYuanMoEV1 at the size of
configs/bench.py on the CPU, or of its HYV3 at that of configs/bench_hy3.py.  Run by
side_by_side.py.
"""

import json
import statistics
import sys
import time

import torch
import transformers

BATCH, LENGTH, STEPS = 8, 256, 20


def new_model(name, eos_token_id):
    """A random float32 model; eos_token_id: where `generate` stops, or None."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": eos_token_id,
        "tie_word_embeddings": False,
    }
    if name == "bench_hy3":
        experts = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
        config = transformers.HYV3Config(**sizes, **experts)
        return transformers.HYV3ForCausalLM(config).float()
    config = transformers.HunYuanMoEV1Config(**sizes, num_experts=8, moe_topk=1)
    return transformers.HunYuanMoEV1ForCausalLM(config).float()


def main():
    """Prints one JSON line."""
    model = new_model(sys.argv[1], eos_token_id=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ids = torch.randint(3, 1024, (BATCH, LENGTH))

    def train_step():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    train_seconds = median_seconds(train_step)
    model.eval()
    with torch.no_grad():
        prefill_seconds = median_seconds(
            lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)
        )
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens_per_second": BATCH * LENGTH / train_seconds,
                "prefill_tokens_per_second": BATCH * LENGTH / prefill_seconds,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )


def median_seconds(fn):
    """Median wall time of STEPS calls."""
    seconds = []
    for _ in range(STEPS + 2):  # the first two warm up
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
