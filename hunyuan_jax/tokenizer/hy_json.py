"""A ranks file (`hy.tiktoken`) as the tokenizer.json that gives the same ids."""

import json
from typing import Any

from hunyuan_jax.tokenizer.hf import bytes_of_characters
from hunyuan_jax.tokenizer.hy import SPLIT_PATTERN, parse_ranks, special_ids_of

# What a folder says itself takes precedence (`HyTokenizer`).
_NAMED = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
_STOPS = ("<|eos|>", "<|extra_5|>")


def json_files(where: str, files: dict[str, bytes], num_ids: int) -> dict[str, bytes]:
    """The files of a folder with hy.tiktoken, with a tokenizer.json in its place.

    tiktoken merges the two neighbours whose concatenation has the lowest rank, a tokenizer.json a
    pair that it lists.  So every way to divide a token into two is listed, in order of ranks.

    Args:
      where: the folder, for errors.
      files: by name; others than the tokenizer's stay.
      num_ids: rows of the model's table, as for `HyTokenizer`.

    Raises:
      ConfigError: as `read_ranks`.
    """
    tokens = parse_ranks(f"{where}/hy.tiktoken", files["hy.tiktoken"])
    special_ids = special_ids_of(len(tokens), num_ids)
    config = _NAMED | json.loads(files.get("tokenizer_config.json", b"{}"))
    stops = {"eos_token_id": [special_ids[name] for name in _STOPS]}
    stops |= json.loads(files.get("generation_config.json", b"{}"))
    made = {
        "tokenizer.json": _tokenizer(tokens, special_ids),
        "tokenizer_config.json": config,
        "generation_config.json": stops,
    }
    kept = {name: text for name, text in files.items() if name != "hy.tiktoken"}
    return kept | {name: json.dumps(value).encode() for name, value in made.items()}


def _tokenizer(tokens: list[bytes], special_ids: dict[str, int]) -> dict[str, Any]:
    character_of = {byte: character for character, byte in bytes_of_characters().items()}
    texts = ["".join(map(character_of.__getitem__, token)) for token in tokens]
    rank_of = {text: rank for rank, text in enumerate(texts)}
    merges = []
    for text in texts:
        pairs = ((text[:i], text[i:]) for i in range(1, len(text)))
        pairs = [(a, b) for a, b in pairs if a in rank_of and b in rank_of]
        merges += sorted(pairs, key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in special_ids.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"behavior": "Isolated", "invert": False},
                byte_level | {"use_regex": False},
            ],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # tiktoken looks for a whole piece first
            "vocab": rank_of,
            "merges": [list(pair) for pair in merges],
        },
    }
