"""The parameters of an opened model on the devices: as numbers or in few bits, with an adapter."""

import os
from typing import Any

import jax
from jax.sharding import Mesh

from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import device_kind
from hunyuan_jax.params import abstract
from hunyuan_jax.params.tree import join
from hunyuan_jax.weights import few_bits, peft
from hunyuan_jax.weights.open import Model


def load_params(
    model: Model,
    mesh: Mesh,
    method: str | None,
    option: str,
    adapter: str | os.PathLike | None = None,
    *,
    is_frozen: bool = False,
) -> dict[str, Any]:
    """Reads the parameters of a model.

    Args:
      model: opened; mesh: with the devices that they go to.
      method: one of few_bits.CHOICES; None keeps the integer codes of a quantised folder.
      option: that gives `method`, for errors.
      adapter: folder or hub id of an adapter in PEFT's format, which is merged.
      is_frozen: as for `few_bits.read`.

    Returns:
      A nested dict of arrays and QuantArrays.

    Raises:
      ConfigError: a method that is none or not for this model or these devices; as `Model.read`,
        `few_bits.read` and `peft.read_adapter`.
    """
    cfg, entries = model.cfg, model.entries
    few_bits.check_method(cfg, method, option)
    few_bits.check_product(method, device_kind(mesh), option)
    specs = abstract_model(cfg, mesh)[1]
    is_made = method not in (None, few_bits.NUMBERS)
    if adapter is None and (is_made or (model.is_quantized and method is None)):
        read, codes = model.tensor, model.codes
        return few_bits.read(entries, cfg.dtype, specs, method, read, codes, is_frozen=is_frozen)
    params = model.read(abstract.shardings(specs))
    if adapter is None:
        return params
    adapted, adapters = peft.read_adapter(adapter, cfg, entries)
    _, merged = lora.merge(adapted, join(params, adapters))
    params = jax.tree.map(lambda new, old: new.astype(old.dtype), merged, params)
    if not is_made:
        return params
    read = few_bits.of_params(params)
    return few_bits.read(entries, cfg.dtype, specs, method, read, lambda entry: None)
