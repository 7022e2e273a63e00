"""Models that are named by a hub id: which of their files are fetched."""

import os

from hunyuan_jax import hub
from hunyuan_jax.files import AnyPath, json_object, user_path
from hunyuan_jax.gguf.container import files_of
from hunyuan_jax.weights import folder as official
from hunyuan_jax.weights.gguf_file import SUFFIX, GgufFile
from hunyuan_jax.weights.storage import Place

# What an import and an export take along beside the weights.
_TEXTS = (*hub.TOKENIZER_FILES, "*.py", "*.txt", "LICENSE*", "License*", "NOTICE*", "Notice*")


def model_place(path: str | os.PathLike) -> Place:
    """The place of a model, whose files are fetched first if `path` is a hub id (`hub.hub_id`).

    A path that ends in .gguf is a file.  Of a folder only one kind of weights is fetched,
    safetensors if there are any, and none of a model that cannot be loaded.

    Raises:
      ConfigError: what `hub.fetch`, `require_loadable` and `Place` refuse.
    """
    path = user_path(path, "the folder", AnyPath)
    wanted = hub.hub_id(path)
    if path.endswith(SUFFIX):
        return GgufFile(path if wanted is None else _fetched_file(wanted))
    if wanted is None:
        return Place(path)
    place = Place(hub.fetch(wanted, _TEXTS))
    if not place.is_file("config.json"):
        return place
    where = f"{place}/config.json"
    official.require_loadable(json_object(where, place.read("config.json")))
    # The weights come from the same commit, whatever is uploaded meanwhile.
    root = place.url.removesuffix(f"/{wanted.folder}") if wanted.folder else place.url
    wanted = wanted._replace(revision=os.path.basename(root))
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        files = _listed_files(place, f"{stem}.{suffix}.index.json")
        files = files or [f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}"]
        hub.fetch(wanted, ["config.json", *files])
        if any(name.endswith(f".{suffix}") for name in place.sizes()):
            break
    return place


def _fetched_file(wanted: hub.HubId) -> str:
    folder, _, file = wanted.folder.rpartition("/")
    return os.path.join(hub.fetch(wanted._replace(folder=folder), files_of(file)), file)


def _listed_files(place: Place, index: str) -> list[str]:
    """The files of an index of shards; [] if there is no index, or one without files."""
    if not place.is_file(index):
        return []
    stated = json_object(f"{place}/{index}", place.read(index)).get("weight_map")
    files = stated.values() if isinstance(stated, dict) else ()
    return sorted({file for file in files if isinstance(file, str)})
