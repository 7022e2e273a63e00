"""ParamSpecs of small parameter trees, for tests of code that depends on roles."""

from typing import Any

import jax
import numpy as np

from hunyuan_jax.params.abstract import ParamSpec
from hunyuan_jax.params.tree import path_of

_ROLES = {
    "embed/embedding_VD": "embedding",
    "lm_head/w_VD": "matrix",
    "lm_head/w_DV": "matrix",
    "moe/router_DE": "router",
    **dict.fromkeys(("scale_D", "q_norm_H", "k_norm_H"), "norm"),
    **dict.fromkeys(("bq_NH", "bk_KH", "bv_KH", "bo_D"), "bias"),
    **dict.fromkeys(("wq_DNH", "wq_DN", "wk_DKH", "wv_DKH", "wo_NHD"), "matrix"),
    **dict.fromkeys(("w_gate_DF", "w_up_DF", "w_down_FD"), "matrix"),
    **dict.fromkeys(("w_gate_EDF", "w_up_EDF", "w_down_EFD"), "expert"),
}


def specs_like(tree: Any) -> Any:
    """Returns unsharded ParamSpecs for a nested dict of arrays, shapes or numbers."""

    def spec(path, leaf):
        name = path_of(path)
        shape = getattr(leaf, "shape", np.shape(leaf))
        stacked = ("layers",) * name.startswith("groups/") + ("experts",) * ("/experts/" in name)
        dims = (*stacked, *("embed",) * (len(shape) - len(stacked)))
        (role,) = (role for end, role in _ROLES.items() if f"/{name}".endswith(f"/{end}"))
        return ParamSpec(tuple(shape), np.dtype(np.float32), dims, role, None)

    return jax.tree.map_with_path(spec, tree)
