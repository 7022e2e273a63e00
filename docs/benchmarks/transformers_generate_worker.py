"""transformers' `generate` at the size of configs/bench.py on the CPU.  Run by generation.py."""

import sys
import time

import torch
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

PROMPT, NEW_TOKENS = 64, 256


def main():
    """Seconds of one call for each batch size on a line of standard input."""
    torch.manual_seed(0)
    config = HunYuanMoEV1Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        moe_topk=1,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = HunYuanMoEV1ForCausalLM(config).float().eval()
    for line in sys.stdin:
        ids = torch.randint(3, 1024, (int(line), PROMPT))
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        seconds = time.perf_counter() - start
        assert out.shape[1] == PROMPT + NEW_TOKENS
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
