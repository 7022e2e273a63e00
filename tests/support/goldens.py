"""Reads the golden data: outputs of the official code on small random models.

tests/golden/README.md says how it was made.

Letters: B batch, S tokens of a row, T = B * S, k choices a token, E experts, V vocabulary.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from hunyuan_jax.config import ModelConfig
from hunyuan_jax.model.abstract import abstract_model
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.params import abstract
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.open import open_model
from support import paths

FAMILIES = ("large", "hf", "hy3")
COPIED, COPIED_HF, COPIED_HY3 = (paths.GOLDEN / family for family in FAMILIES)
COMPLETE, COMPLETE_HF, COMPLETE_HY3 = (paths.SHARED / "golden" / family for family in FAMILIES)

# The released code never drops tokens.  For these cases a capacity of k * T / E was patched into
# it (README).
CAPACITY_CASES = ("capacity_drop", "capacity_drop_first", "capacity_recycle", "capacity_topk")
PADDED_CASES = ("left_pad", "right_pad")
ROPE_CASES = ("long_alpha", "rope_plain", "rope_linear")
FORWARD_CASES = (
    "a52b_tiny",
    "topk_nocla",
    "topk_noshared",
    "dense",
    "dense_bias",
    "cla_factor4",
    *CAPACITY_CASES,
    *PADDED_CASES,
    *ROPE_CASES,
)
HF_CASES = (
    "moe_top2_shared",
    "moe_alpha_tied_lists",
    "moe_top1",
    "dense_alpha_tied",
    "dense_bias_untied",
    "hub_moe_bf16",
)
ALL_CASES = (
    *FORWARD_CASES,
    "rope_ntk_factor",
    "generate",
    "grad_reentrant",
    "train_steps",
    "bf16",
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case: a model folder in the official format, and the recorded arrays.

    tests/golden/README.md explains the names of the arrays.
    """

    name: str
    folder: Path
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def int32(self, key: str) -> np.ndarray:
        """Returns a recorded int64 array as int32, which the model takes."""
        return self.arrays[key].astype(np.int32)

    def per_layer(self, key: str) -> list[np.ndarray]:
        """Returns the arrays key.0, key.1, ... of the layers.

        Skips the test if the repository's copy does not have them.
        """
        found = [name for name in self.arrays if name.startswith(f"{key}.")]
        if not found and self.folder.parent in (COPIED, COPIED_HF):
            pytest.skip(
                f"the copy of {self.name} in the repository has no {key}, and ../shared/golden is "
                "not there"
            )
        return [self.arrays[f"{key}.{layer}"] for layer in range(len(found))]

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """input_ids, attention_mask and position_ids, int32 [B, S].

        Without padding they are the defaults of the official forward.
        """
        ids_BS = self.int32("input_ids")
        mask_BS = (
            self.int32("attention_mask")
            if "attention_mask" in self.arrays
            else np.ones_like(ids_BS)
        )
        if "position_ids" in self.arrays:
            return ids_BS, mask_BS, self.int32("position_ids")
        return (
            ids_BS,
            mask_BS,
            np.broadcast_to(np.arange(ids_BS.shape[1], dtype=np.int32), ids_BS.shape),
        )

    @property
    def labels(self) -> np.ndarray:
        """The labels, int32 [B, S]; -100 is ignored.

        With left padding, the recorded loss includes the first token of the text, predicted at a
        padding position.  Outputs there are undefined (the official backends differ), so this
        target is ignored here.
        """
        labels_BS, mask_BS = self.int32("labels"), self.inputs[1]
        labels_BS[:, 1:][mask_BS[:, :-1] == 0] = -100
        return labels_BS


def folder_of(case: str) -> Path:
    """Returns the complete folder beside the checkout, or else the copy in the repository.

    Skips the test if neither exists.
    """
    for root in (COMPLETE, COMPLETE_HF, COMPLETE_HY3, COPIED, COPIED_HF, COPIED_HY3):
        if (root / case / "config.json").is_file():
            return root / case
    pytest.skip(
        f"golden case {case} is not part of the repository and ../shared/golden is not there"
    )
    raise AssertionError


@functools.cache
def load(case: str) -> Golden:
    """Reads a case, once per process."""
    folder = folder_of(case)
    return Golden(case, folder, safetensors.numpy.load_file(folder / "golden.safetensors"))


def read_model(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns (config, parameters on the first device) of a model folder."""
    opened, mesh = open_model(folder), single_device_mesh()
    return opened.cfg, opened.read(abstract.shardings(abstract_model(opened.cfg, mesh)[1]))


def official_tensors(cfg: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns our nested parameters or gradients with the official names and layout."""

    def at(path):
        return functools.reduce(lambda node, key: node[key], path.split("/"), params)

    return {
        e.name: table.to_official(np.asarray(at(e.path))[e.index], e) for e in table.entries(cfg)
    }
