"""Times transformers' `generate` at the size of a config for benchmarks on the CPU.

benchmarks/generation.py runs it.
"""

import sys
import time

import torch
from transformers_worker import new_model

PROMPT, NEW_TOKENS = 64, 256


def main():
    """Seconds of one call for each batch size on a line of standard input."""
    model = new_model(sys.argv[1], eos_token_id=None).eval()
    for line in sys.stdin:
        ids = torch.randint(3, 1024, (int(line), PROMPT))
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        seconds = time.perf_counter() - start
        assert out.shape[1] == PROMPT + NEW_TOKENS
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
