"""The parameters in the newest checkpoint of a run, without its optimizer."""

import contextlib
import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np

from hunyuan_jax.checkpoint.store import Store, read_config
from hunyuan_jax.config import LoraConfig, ModelConfig
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.layers import lora
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.model.stored import abstract_stored_params
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import abstract
from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.params.roles import KEPT_ROLES
from hunyuan_jax.params.tree import split
from hunyuan_jax.quant.scaled import dequantize, is_scaled, load_params
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import few_bits, names, side_files
from hunyuan_jax.weights.folder import with_stop_ids


class Run:
    """The newest checkpoint of a workdir whose parameters are not damaged, as a `Model` (open.py).
    Nothing is changed in the workdir.

    config: of the run; cfg: of the plain model, into which adapters are merged.
    """

    layout, is_quantized = None, False

    def __init__(self, workdir: Place, dtype: str | None = None):
        """Raises ConfigError: no run, or no finished checkpoint yet."""
        self.config = read_config(workdir.path())
        cfg = dataclasses.replace(
            self.config.model, lora=LoraConfig(), dtype=dtype or self.config.model.dtype
        )
        self._workdir, self.place = workdir.path(), workdir.inside(side_files.FOLDER)
        self.cfg = with_stop_ids(cfg, self.place)
        self.entries = names.entries(self.cfg)
        self.tokenizer = side_files.tokenizer_of(self.config, self.place)
        self.others = [name for name in sorted(self.place.sizes()) if name != "config.json"]
        with self._store() as store:
            self._step, self._facts = store.newest_good(("params",))
        self.fingerprint = f"{self._facts['config_hash']} {self._step}"

    def read(self, shardings: dict[str, Any]) -> dict[str, Any]:
        """The parameters of `cfg` on the devices of `shardings`, adapters merged; the router in
        float32, all others in the dtype of `cfg`.
        """
        dtype = self.cfg.dtype
        adapted, mesh = self.config.model, jax.tree.leaves(shardings)[0].mesh
        target, specs = self._target(adapted, mesh), abstract_model(self.cfg, mesh)[1]
        if not adapted.lora.rank:
            # Cast as it is read: no float32 copy.
            target = _with_dtypes(target, specs, dtype)
            return _plain(self._restore(target), specs, dtype)
        _, merged = lora.merge(adapted, load_params(self._restore(target)))
        return jax.device_put(_plain(merged, specs, dtype), shardings)

    def tensor(self, entry: names.Entry) -> np.ndarray:
        """One tensor in the official layout; the first call reads them all."""
        return names.read_tensor(self._params, entry)

    def codes(self, entry: names.Entry) -> None:
        """A run holds numbers."""
        del entry

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return self.read(abstract.shardings(abstract_model(self.cfg, single_device_mesh())[1]))

    def read_adapters(self) -> tuple[ModelConfig, dict[str, Any]]:
        """(model config with its lora section, the adapters alone as float32 numpy arrays).

        Raises:
          ConfigError: a run without adapters.
        """
        cfg = self.config.model
        if not cfg.lora.rank:
            raise ConfigError(
                f"{self._workdir} has trained all parameters (config.model.lora.rank = 0); it has "
                "no adapter. Export the whole model."
            )
        mesh = single_device_mesh()
        adapters, _ = split(self._target(cfg, mesh), abstract_model(cfg, mesh)[1])
        return cfg, jax.tree.map(np.asarray, load_params(self._restore(adapters)))

    def _target(self, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        # Not the state_dtype of config.json, which may already name the next one.
        target = abstract_stored_params(cfg, mesh, self._facts["state_dtype"])
        return few_bits.with_base(cfg, abstract_model(cfg, mesh)[1], target)

    def _restore(self, target: dict[str, Any]) -> dict[str, Any]:
        with self._store() as store:
            while True:
                failure = None
                try:
                    items = store.restore(self._step, {"params": target}, is_partial=True)
                except Exception as error:  # orbax raises many types
                    failure = error
                if store.has(self._step):
                    if failure:
                        raise failure
                    return items["params"]
                # Its run has deleted it while it was read: there is a newer one.
                self._step, self._facts = store.newest_good(("params",))

    @contextlib.contextmanager
    def _store(self):
        settings = dataclasses.replace(self.config.checkpoint, mirror="")
        report = functools.partial(print, file=sys.stderr)
        with contextlib.closing(Store(self._workdir, settings, report, is_alone=True)) as store:
            yield store


def _with_dtypes(target: dict[str, Any], specs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Shapes and shardings with the dtypes in which `Run.read` gives them, but for quantised
    matrices.
    """

    def cast(leaf, spec):
        if is_scaled(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, _dtype_of(spec, dtype), sharding=leaf.sharding)

    return jax.tree.map(cast, target, specs, is_leaf=is_scaled)


def _plain(params: dict[str, Any], specs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Arrays in the dtypes in which `Run.read` gives them."""

    def cast(leaf, spec):
        kept = _dtype_of(spec, dtype)
        return dequantize(leaf, kept) if is_scaled(leaf) else leaf.astype(kept)

    return jax.tree.map(cast, params, specs, is_leaf=is_scaled)


def _dtype_of(spec: ParamSpec, dtype: str) -> str:
    return "float32" if spec.role in KEPT_ROLES else dtype
