"""Validation: cross entropy, perplexity and bits per byte of held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hunyuan_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def with_target_bytes(batches: list[Batch], tokenizer: Tokenizer) -> list[Batch]:
    """The batches with target_bytes, float32 [R, T]: UTF-8 bytes of text behind each target; 0 for
    padding, eos and other special tokens.

    Bytes of the text as the tokenizer sees it, so in NFC for Hunyuan's.
    """
    if not batches:
        return []
    bytes_V = np.array(
        [len(tokenizer.decode_bytes([i], skip_special=True)) for i in range(tokenizer.vocab_size)],
        np.float32,
    )
    return [
        {**batch, "target_bytes": bytes_V[batch["targets"]] * (batch["loss_weights"] > 0)}
        for batch in batches
    ]


def evaluate(eval_step: Callable, params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """What metrics.jsonl gets of a validation: loss in nats a target over all batches, perplexity,
    bits per byte.

    Bits per byte: the cross entropy of all targets, those that end a document included, in bits
    over the bytes of text.  It is left out where the targets are no text at all.
    """
    sums = [eval_step(params, batch) for batch in batches]
    nats, targets, num_bytes = (sum(map(float, figures)) for figures in zip(*sums, strict=True))
    loss = nats / targets
    bits = {"validation_bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}
    return {
        "validation_loss": loss,
        "validation_perplexity": math.exp(min(loss, 700.0)),
        **bits,
    }  # exp(700) is about the largest float
