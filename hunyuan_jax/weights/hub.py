"""Models that are named by a hub id: which of their files are fetched."""

import os

from hunyuan_jax import hub
from hunyuan_jax.files import json_object, user_path
from hunyuan_jax.weights import hf_config
from hunyuan_jax.weights.storage import Place

# Everything beside the weights that an import and an export take along.
_TEXTS = (*hub.TOKENIZER_FILES, "*.py", "*.txt", "LICENSE*", "License*", "NOTICE*", "Notice*")


def model_place(path: str | os.PathLike) -> Place:
    """The place of a model, fetched first if `path` is a hub id (`hub.hub_id`).

    Of several kinds of weights safetensors are taken; a model that cannot be loaded is refused
    before its weights are fetched.

    Raises:
      ConfigError: what `hub.fetch`, `from_hf` and `Place` refuse.
    """
    path = user_path(os.fspath(path))
    wanted = hub.hub_id(path)
    if wanted is None:
        return Place(path)
    place = Place(hub.fetch(wanted, _TEXTS))
    if not place.is_file("config.json"):
        return place
    config = json_object(f"{place}/config.json", place.read("config.json"))
    hf_config.from_hf(hf_config.with_dtype(config, "float32"))
    # The rest comes from the same commit, whatever the hub is given meanwhile.
    root = place.url.removesuffix(f"/{wanted.folder}") if wanted.folder else place.url
    same = wanted._replace(revision=os.path.basename(root))
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = f"{single}.index.json"
        files = {single}
        if place.is_file(index):
            stated = json_object(f"{place}/{index}", place.read(index)).get("weight_map")
            files = set(stated.values()) if isinstance(stated, dict) else files
        hub.fetch(same, ["config.json", *sorted(files)])
        if any(place.is_file(file) for file in files):
            break
    return place
