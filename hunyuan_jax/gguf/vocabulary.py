"""The tokenizer, chat template and sampling settings in a GGUF file's metadata, as the files of a
model folder, and back.

Byte-level BPE only ("gpt2", as the models of this library have).  A file names the way in which
text is split before the merges (tokenizer.ggml.pre) instead of holding it.
"""

import json
from typing import Any

import numpy as np

from hunyuan_jax.errors import ConfigError
from hunyuan_jax.gguf.container import read_header
from hunyuan_jax.storage import HeldFiles, Place

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
# The pieces of GPT-2, of its successors with at most `digits` in a piece, and of DeepSeek-V3
# (llama.cpp, src/llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_PATTERNS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LATER.replace("DIGITS", "{1,3}"),),
    "qwen2": (_LATER.replace("DIGITS", ""),),
    "hunyuan": (_LATER.replace("DIGITS", ""),),
    "hunyuan-dense": _DEEPSEEK,
    "deepseek-v3": _DEEPSEEK,
}
_ALIASES = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_ALIASES |= {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm"}
_NFC = ("qwen2", "hunyuan")  # whose tokenizers compose characters first
_IDS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
# Fields of generation_config.json -> the names of llama.cpp, after "general.sampling.".
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_SAMPLING |= {"repetition_penalty": "penalty_repeat"}


def require_readable(where: str, fields: dict[str, Any]) -> str:
    """How text is split, a name of _PATTERNS.

    Raises:
      ConfigError: a tokenizer of another kind.
    """
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2" or _ALIASES.get(pre, pre) not in _PATTERNS:
        raise ConfigError(
            f"{where} has a tokenizer of model {model!r}, pre {pre!r}; 'gpt2' with "
            f"{', '.join(_PATTERNS)} is read. Give another one with --tokenizer."
        )
    return _ALIASES.get(pre, pre)


def folder(file: Place) -> HeldFiles:
    """The tokenizer of a GGUF file as a folder.

    Raises:
      ConfigError: as `read_header` and `folder_files`.
    """
    fields = read_header(file).fields
    return HeldFiles(file, folder_files(file.url, fields))


def folder_files(where: str, fields: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a file's metadata.

    Raises:
      ConfigError: another kind of tokenizer, lists that do not fit each other.
    """
    pre = require_readable(where, fields)
    tokens, kinds, merges = (
        fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    if not tokens or merges is None or len(kinds or tokens) != len(tokens):
        raise ConfigError(
            f"{where}: tokenizer.ggml.tokens, token_type and merges are not lists that fit each "
            "other. The file is damaged; give a tokenizer with --tokenizer."
        )
    kinds = kinds or [_NORMAL] * len(tokens)
    ids = {
        name: fields[f"tokenizer.ggml.{ours}_token_id"]
        for ours, name in _IDS.items()
        if 0 <= fields.get(f"tokenizer.ggml.{ours}_token_id", -1) < len(tokens)
    }
    config = {name: tokens[i] for name, i in ids.items()}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if (template := fields.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    added = [
        _added(i, token, kind == _CONTROL)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    # "eos" ends a document, "eot" a turn.
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eos", "eom")]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    files = {
        "tokenizer.json": _tokenizer(pre, tokens, merges, added),
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": ends, **_sampling(fields)},
    }
    return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}


def _sampling(fields: dict[str, Any]) -> dict[str, float | int]:
    """The settings of a file; a float32 of 0.95 is 0.95 again."""
    found = {ours: fields.get(f"general.sampling.{name}") for ours, name in _SAMPLING.items()}
    return {
        name: float(str(np.float32(value))) if isinstance(value, float) else value
        for name, value in found.items()
        if value is not None
    }


def sampling_fields(files: dict[str, bytes]) -> dict[str, float | int]:
    """The metadata of a folder's generation_config.json, whose `do_sample: false` is temperature
    0; {} without the file.
    """
    stated = json.loads(files.get("generation_config.json", b"{}"))
    if stated.get("do_sample") is False:
        stated["temperature"] = 0
    return {
        f"general.sampling.{name}": int(stated[ours]) if ours == "top_k" else float(stated[ours])
        for ours, name in _SAMPLING.items()
        if isinstance(stated.get(ours), int | float)
    }


def _added(i: int, token: str, is_special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, **flags, "special": is_special}


def _tokenizer(
    pre: str, tokens: list[str], merges: list[str], added: list[dict[str, Any]]
) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                *(
                    {
                        "type": "Split",
                        "pattern": {"Regex": pattern},
                        "behavior": "Isolated",
                        "invert": False,
                    }
                    for pattern in _PATTERNS[pre]
                ),
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def fields_of(where: str, files: dict[str, bytes], num_ids: int) -> dict[str, Any]:
    """The metadata of a folder's tokenizer, inverse of `folder_files`; {"tokenizer.ggml.model":
    "none"} of a folder without one.

    Args:
      where: the folder, for errors.
      files: of the folder, by name.
      num_ids: rows of the model's table; ids beyond the tokenizer's are unused tokens.

    Raises:
      ConfigError: a tokenizer that llama.cpp has no name for, or of another model.
    """
    if "tokenizer.json" not in files:
        return {"tokenizer.ggml.model": "none"}
    about = json.loads(files["tokenizer.json"])
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    ends = json.loads(files.get("generation_config.json", b"{}")).get("eos_token_id") or []
    pre = next((n for n, p in _PATTERNS.items() if p == _patterns(about)), None)
    if about["model"].get("type") != "BPE" or pre is None:
        raise ConfigError(
            f"{where}/tokenizer.json splits text in a way that GGUF has no name for here; "
            f"{', '.join(_PATTERNS)} are written. Convert the folder with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    given = [*about["model"]["vocab"].values(), *(added["id"] for added in about["added_tokens"])]
    if max(given, default=0) >= num_ids:
        raise ConfigError(
            f"{where}: the tokenizer has the id {max(given)}, and the model's table {num_ids} "
            "rows. Put the model's own tokenizer there."
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(num_ids)], [_UNUSED] * num_ids
    for token, i in about["model"]["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in about["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    id_of = {token: i for i, token in enumerate(tokens)}
    named = {
        f"tokenizer.ggml.{ours}_token_id": id_of[text]
        for ours, name in _IDS.items()
        if (text := _content(config.get(name))) in id_of
    }
    ends = ends if isinstance(ends, list) else [ends]
    others = [i for i in ends if i != named.get("tokenizer.ggml.eos_token_id")]
    for ours, i in zip(("eot", "eom"), others, strict=False):
        named[f"tokenizer.ggml.{ours}_token_id"] = i
    template = files.get("chat_template.jinja", b"").decode() or config.get("chat_template")
    merges = [m if isinstance(m, str) else " ".join(m) for m in about["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,  # the chat template has it
        **named,
        **({"tokenizer.chat_template": template} if isinstance(template, str) else {}),
    }


def _patterns(about: dict[str, Any]) -> tuple[str, ...]:
    """How a tokenizer.json splits text, as in _PATTERNS; () for ways that are not in it."""
    before = about.get("pre_tokenizer") or {}
    found = []
    for part in before.get("pretokenizers", [before]):
        if part.get("type") == "Split" and part.get("behavior") == "Isolated":
            found.append(part["pattern"].get("Regex", ""))
        elif part.get("type") == "Digits" and part.get("individual_digits"):
            found.append(r"\p{N}")
        elif part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
            found += [_GPT2] * bool(part.get("use_regex", True))
        else:
            return ()
    return tuple(found)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
