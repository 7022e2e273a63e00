"""Small models, their parameters, and official model folders of random numbers."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from hunyuan_jax.config import ModelConfig, MoeConfig
from hunyuan_jax.parallel.mesh import single_device_mesh
from hunyuan_jax.storage import Place
from hunyuan_jax.train.state import abstract_model
from hunyuan_jax.weights import hf_config
from hunyuan_jax.weights import names as table
from hunyuan_jax.weights.folder import OfficialFolder


def small(**changes) -> ModelConfig:
    """Returns an MoE model with CLA pairs and a few thousand parameters."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
    }
    moe = MoeConfig(num_experts=3, num_shared_experts=1)
    return dataclasses.replace(
        ModelConfig(vocab_size=40, max_position=64, cla_share_factor=2, moe=moe, **sizes),
        **changes,
    )


def random_params(cfg: ModelConfig, seed: int = 0) -> dict:
    """Returns float32 parameters in the layout of training."""
    rng = np.random.default_rng(seed)
    shapes = abstract_model(cfg, single_device_mesh())[1]
    return jax.tree.map(lambda a: rng.normal(scale=0.5, size=a.shape).astype(np.float32), shapes)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors in the files of an official folder."""
    opened = OfficialFolder(Place(folder))
    return {name: opened.read_tensor(name) for name in opened.tensors}


def flat(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


HF = {
    "model_type": "hunyuan", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "use_cla": True, "cla_share_factor": 2, "num_experts": 3, "moe_topk": 1,
    "use_mixed_mlp_moe": True, "num_shared_expert": 1, "use_qk_norm": True,
    "tie_word_embeddings": True, "torch_dtype": "float32", "max_position_embeddings": 64,
    "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
}  # fmt: skip


def write_source(folder: Path, num_shards: int = 2, **changes) -> Path:
    """Writes a folder like the release: shards, index, config, tokenizer."""
    hf = HF | changes
    cfg, rng = hf_config.from_hf(hf), np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16) if cfg.dtype == "bfloat16" else np.dtype(np.float32)
    entries = table.entries(cfg)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer_config.json").write_text('{"a": 1}\n')
    files = {
        e.name: f"model-{i * num_shards // len(entries) + 1:05d}-of-{num_shards:05d}.safetensors"
        for i, e in enumerate(entries)
    }
    for file in dict.fromkeys(files.values()):
        tensors = {
            e.name: (rng.normal(size=e.shape) * (0.3 if len(e.shape) == 2 else 1.0)).astype(dtype)
            for e in entries
            if files[e.name] == file
        }
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
