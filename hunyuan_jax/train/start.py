"""The weights that a run starts from (config.train.init_from): what a recipe takes from them, the
check that they are the run's model, and the files beside them that a run keeps.
"""

import dataclasses
import os
import runpy
import shutil
from typing import Any

from jax.sharding import Mesh

from hunyuan_jax.config import Config, ModelConfig, from_dict, to_dict
from hunyuan_jax.errors import ConfigError
from hunyuan_jax.storage import Place
from hunyuan_jax.weights import side_files
from hunyuan_jax.weights.gguf_file import model_place
from hunyuan_jax.weights.load import load_params
from hunyuan_jax.weights.open import Model, open_model

_MAX_SEQ_LEN = 4096  # of a recipe that leaves it open; that of the official fine-tuning script

_RECIPE = ".py"

_GENERATION = "generation_config.json"
_INIT_FROM = "config.train.init_from"
_TEACHER = "config.objective.distill.teacher"

# Fields that a run may change.  All others decide what the weights mean.
_FREE = {
    "max_position",
    "attention_dropout",
    "hidden_dropout",
    "init_std",
    "pad_token_id",
    "bos_token_id",
    "eos_token_ids",
}
_FREE |= {"dtype", "remat", "kernels", "context_attention", "lora"}
_FREE |= {"fp32_head", "num_mtp_layers", "mtp_loss_weight"}
_FREE_MOE = {
    "dispatch",
    "capacity_factor",
    "min_capacity",
    "group_size",
    "aux_loss_weight",
    "z_loss_weight",
    "bias_rate",
    "bias_limit",
}


def complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe with what is None filled in from the weights of its train.init_from, or of
    the larger model that a student inherits from: the model, the tokenizer, and a seq_len of at
    most 4096 that the model can hold.

    Args:
      recipe: nested dict of a `config.weights_recipe`, with the command line's overrides.  Its
        train.init_from may be another recipe, such as configs/a52b.py: `plan` needs no weights.

    Raises:
      ConfigError: no such weights, no model there, or an override that would give its weights
        another meaning.
    """
    path, name = recipe["train"]["init_from"], _INIT_FROM
    is_cut = not path and recipe["objective"]["name"] == "distill"  # out of a larger model
    if is_cut:
        distill = recipe["objective"]["distill"]
        path, name = distill["inherit_from"] or distill["teacher"], _TEACHER
    if not path:
        raise ConfigError(
            f"{name} is empty, and this recipe takes its model from there; set it to a model "
            "folder, its hub id, or the workdir of a run (plan takes a recipe too)."
        )
    cfg, tokenizer = model_at(path, name)
    model = _filled(recipe["model"], to_dict(cfg))
    if not is_cut:
        require_same_model(path, cfg, from_dict(ModelConfig, model, "model."))
    seq_len = min(_MAX_SEQ_LEN, model["max_position"])
    return {
        **recipe,
        "model": model,
        "data": _filled(recipe["data"], {"tokenizer": tokenizer}),
        "train": _filled(recipe["train"], {"seq_len": seq_len}),
    }


def model_at(path: str, name: str = _INIT_FROM) -> tuple[ModelConfig, str]:
    """Model and tokenizer of weights, or of another recipe, which has none: to plan with.

    name: of the field that has the path.

    Raises:
      ConfigError: there is neither.
    """
    if not path.endswith(_RECIPE):
        opened = open_model(path)
        return opened.cfg, str(opened.tokenizer)
    if not os.path.isfile(path):
        raise ConfigError(f"{name} = {path!r}: no such file.")
    values = runpy.run_path(path)["get_config"]().to_dict()
    return from_dict(ModelConfig, values["model"], "model."), values["data"]["tokenizer"]


def weights_at(path: str, dtype: str, name: str = _INIT_FROM) -> Model:
    """Opens a model whose weights are to be read in a dtype; `name` as for `model_at`.

    Raises:
      ConfigError: there is none.
    """
    if path.endswith(_RECIPE):
        raise ConfigError(
            f"{name} = {path!r} is a recipe, which has no weights; set it to a model folder, its "
            "hub id, or the workdir of a run."
        )
    return open_model(path, dtype)


def _filled(values: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` with those of `found` where it has None."""
    return {
        name: _filled(value, found[name])
        if isinstance(value, dict)
        else found[name]
        if value is None
        else value
        for name, value in values.items()
    }


def read_weights(path: str, cfg: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns the parameters of a model on the mesh, a nested dict of arrays.

    They are float32 like a run's master weights, or have the dtype of `cfg` if LoRA freezes them;
    with lora.quantize projections and experts are QuantArrays.

    Args:
      path: a model folder or its hub id, a converted checkpoint, or a workdir, whose newest
        checkpoint is read.
      cfg: the model that the run trains.
      mesh: that of the run.

    Raises:
      ConfigError: the folder does not exist, or its model differs from `cfg`; the message names
        the first field that differs.
    """
    opened = weights_at(path, cfg.dtype if cfg.lora.rank else "float32")
    require_same_model(path, opened.cfg, cfg)
    option = "config.model.lora.quantize"
    params = load_params(opened, mesh, cfg.lora.quantize, option, is_frozen=True)
    # A layer of multi-token prediction that one of the two lacks is drawn, or left out.
    unused = () if cfg.num_mtp_layers else ("mtp", "mtp_groups")
    return {name: tree for name, tree in params.items() if name not in unused}


def require_same_model(
    path: str, theirs: ModelConfig, ours: ModelConfig, name: str = _INIT_FROM
) -> None:
    """Raises ConfigError at the first field that gives the weights of `path`, which the field
    `name` has, another meaning.

    rope_alpha may be raised, as the long-context stages do: the model learns the slower rotation.
    """
    for prefix, a, b, free in (
        ("", theirs, ours, _free(ours)),
        ("moe.", theirs.moe, ours.moe, _FREE_MOE),
    ):
        for field in dataclasses.fields(a):
            here, there = getattr(b, field.name), getattr(a, field.name)
            is_raised = field.name == "rope_alpha" and here > there
            if field.name not in free and field.name != "moe" and here != there and not is_raised:
                raise ConfigError(
                    f"{name} = {path!r} holds a model with {prefix}{field.name} = "
                    f"{there!r}; config.model.{prefix}"
                    f"{field.name} is {here!r}. Set it to {there!r}"
                    f"{' or more' if field.name == 'rope_alpha' else ''}, or start from other "
                    "weights."
                )


def _free(cfg: ModelConfig) -> set[str]:
    return _FREE | {
        name
        for name, rope_type in (("rope_alpha", "alpha"), ("rope_factor", "linear"))
        if cfg.rope_type != rope_type
    }


def keep_files(workdir: str | os.PathLike, config: Config) -> None:
    """Copies the files of a new run's origins to its workdir, in place of what is there.

    The tokenizer is that of config.data.tokenizer, all else that of config.train.init_from if it
    has it.  Without a generation config there, one says its stop ids.

    Raises:
      ConfigError: one of the two cannot be read.
    """
    texts, tokenizer = {}, _tokenizer_files(config.data.tokenizer)
    if config.train.init_from:
        texts = _model_files(config.train.init_from, config.model)
        is_bare = tokenizer.keys() == {"hy.tiktoken"}
        texts = {
            name: text
            for name, text in texts.items()
            if not side_files.TOKENIZER.fullmatch(name)
            or (is_bare and name not in side_files.VOCABULARIES)
        }
    texts = tokenizer | texts
    shutil.rmtree(os.path.join(workdir, side_files.FOLDER), ignore_errors=True)
    target = Place(workdir).inside(side_files.FOLDER)
    for name, text in texts.items():
        target.write(name, [text])


def _tokenizer_files(name: str) -> dict[str, bytes]:
    if name == "byte":
        return {}
    place, file = model_place(name), ""
    if place.is_file():
        place, file = place.parent()
    if file and not file.endswith(".json"):
        return {"hy.tiktoken": place.read(file)}
    # config.json says how many ids there are.
    texts = {
        n: place.read(n)
        for n in sorted(place.names())
        if side_files.is_side_file(n) or n == "config.json"
    }
    return texts | ({"tokenizer.json": place.read(file)} if file else {})


def _model_files(path: str, cfg: ModelConfig) -> dict[str, bytes]:
    opened = open_model(path)
    texts = {
        name: opened.place.read(name) for name in opened.others if side_files.is_side_file(name)
    }
    if _GENERATION not in texts and opened.cfg.eos_token_ids and not cfg.eos_token_ids:
        stop_ids = list(opened.cfg.eos_token_ids)
        texts[_GENERATION] = b'{"eos_token_id": %s}\n' % str(stop_ids).encode()
    return texts
