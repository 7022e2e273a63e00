"""Recipes of post-training, set for quick runs that start from a small model folder."""

import functools

from ml_collections import ConfigDict

from hunyuan_jax.cli import complete
from hunyuan_jax.config import Config, from_config_dict
from support import paths

FOLDER = paths.ROOT / "tests/golden/hf/moe_top1"


def recipe_of(name: str, source: object, **changes) -> ConfigDict:
    """The recipe of configs/NAME.py for FOLDER and these data; in the names of fields __ is a
    dot.
    """
    namespace = {}
    exec((paths.ROOT / f"configs/{name}.py").read_text(), namespace)
    values = namespace["get_config"]()
    changes = {"train__init_from": str(FOLDER), "data__source": str(source), **changes}
    for path, value in changes.items():
        *sections, field = path.split("__")
        setattr(functools.reduce(getattr, sections, values), field, value)
    return values


def config_of(name: str, source: object, **changes) -> Config:
    """As `recipe_of`, with what a recipe takes from its weights."""
    return from_config_dict(recipe_of(name, source, **changes), complete)
