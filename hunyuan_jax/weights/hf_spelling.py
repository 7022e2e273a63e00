"""One spelling of config.json: the hub's, transformers 5's and older ones made the same."""

import math
from types import NoneType
from typing import Any

from hunyuan_jax.errors import ConfigError

# The types json gives for a field, by the type of its default or by name.
_TYPES_OF_DEFAULT = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_TYPES = {
    "bos_token_id": (int, NoneType),
    "eos_token_id": (int, list, NoneType),
    "num_key_value_heads": (int, NoneType),
    "pad_token_id": (int, NoneType),
    "rope_scaling": (dict, NoneType),
}
_JSON_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list of integers",
}
_JSON_NAMES |= {dict: "an object", NoneType: "null"}
_PER_LAYER = (
    "moe_topk",
    "num_shared_expert",
    "moe_intermediate_size",
)  # an integer, or one for each layer
# torch's names of dtypes, each with the one that is used here.
_DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
_DTYPES |= {"float": "float32", "half": "float16"}
# Names that transformers takes for others (attribute_map of its class).
_ALIASES = {"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # null is a value


def dtype_of(hf: dict[str, Any]) -> str:
    """The dtype that a config.json asks for, in any spelling; float32 if it asks for none."""
    return stated_dtype(hf) or "float32"


def stated_dtype(hf: dict[str, Any]) -> Any:
    """The dtype that a config.json states, None if it is absent, null or "auto".

    Raises:
      ConfigError: two that differ.
    """
    stated = {
        name: _DTYPES.get(str(hf[name]).removeprefix("torch."), hf[name])
        for name in ("dtype", "torch_dtype")
        if hf.get(name) not in (None, "auto")
    }
    if len(set(map(str, stated.values()))) > 1:
        raise ConfigError(
            f"config.json: dtype = {hf['dtype']!r} and torch_dtype = {hf['torch_dtype']!r} are "
            "one field; keep one."
        )
    return next(iter(stated.values()), None)


def with_dtype(hf: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json with another dtype, in the spelling it has."""
    names = [name for name in ("dtype", "torch_dtype") if name in hf] or ["torch_dtype"]
    return {**hf, **dict.fromkeys(names, dtype)}


def one_spelling(hf: dict[str, Any]) -> dict[str, Any]:
    """`hf` in the spelling of the hub: without nulls and other words for what is absent, with
    torch_dtype, rope_theta and rope_scaling where transformers 5 writes dtype and
    rope_parameters, and integers for lists.

    Raises:
      ConfigError: a field in two spellings that differ, layers that differ.
    """
    dtype = stated_dtype(hf)
    hf = {name: v for name, v in hf.items() if v is not None or name in _TOKENS}
    for name in ("dtype", "torch_dtype"):
        hf.pop(name, None)
    if dtype is not None:
        hf["torch_dtype"] = dtype
    for alias, name in _ALIASES.items():
        if alias in hf:
            value = hf.pop(alias)
            if hf.setdefault(name, value) != value:
                raise ConfigError(
                    f"config.json: {alias} = {value!r} and {name} = {hf[name]!r} are one field; "
                    "keep one."
                )
    hf |= _one_rope(hf)
    hf.pop("rope_parameters", None)
    for name in _PER_LAYER:
        values = hf.get(name)
        if isinstance(values, list):
            if len(values) != hf["num_hidden_layers"] or len(set(map(str, values))) != 1:
                raise ConfigError(
                    f"config.json: {name} = {values}; only one value for all of the "
                    f"{hf['num_hidden_layers']} layers is implemented, an integer or a list that "
                    "repeats it for each of them. No release has layers that differ."
                )
            hf[name] = values[0]
    return hf


def _one_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, if it is stated, and rope_scaling of a config.json in any spelling."""
    both = {n: hf[n] for n in ("rope_parameters", "rope_scaling") if hf.get(n) not in (None, {})}
    thetas = {"rope_theta": hf["rope_theta"]} if "rope_theta" in hf else {}
    scalings = []
    for name, value in both.items():
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {name} = {value!r} must be an object or null.")
        value = {n: v for n, v in value.items() if v is not None}
        theta = value.pop("rope_theta", None)
        if theta is not None and thetas.setdefault("rope_theta", theta) != theta:
            raise ConfigError(
                f"config.json: rope_theta is {thetas['rope_theta']}, but {theta} in {name}; keep "
                "one."
            )
        if value.get("partial_rotary_factor", 1) == 1:
            value.pop("partial_rotary_factor", None)
        scalings.append({"type" if n == "rope_type" and "type" not in value else n: v
                         for n, v in value.items()} or None)  # fmt: skip
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ConfigError(
            "config.json: rope_parameters and rope_scaling are one field in two spellings, and "
            "differ; keep one."
        )
    return thetas | {"rope_scaling": scalings[0] if scalings else None}


def check_types(hf: dict[str, Any], defaults: dict[str, Any], required: tuple[str, ...]) -> None:
    """Raises ConfigError at the first value of another JSON type than its field has.

    Args:
      hf: a config.json with its defaults filled in.
      defaults: what absent fields are, whose types are checked.
      required: names of further fields, all integers.
    """
    for name in (*required, *defaults):
        value = hf[name]
        types = _TYPES.get(name) or _TYPES_OF_DEFAULT[type(defaults.get(name, 1))]
        if type(value) not in types or (type(value) is float and not math.isfinite(value)):
            raise ConfigError(
                f"config.json: {name} = {value!r} must be "
                f"{' or '.join(_JSON_NAMES[t] for t in types)}."
            )
