"""Files of a model beside its weights: tokenizer, chat template, generation config, code.

A run keeps those of what it came from in its workdir, so that a workdir can be moved, and what is
exported from it is whole.
"""

import os
import re
import shutil

from hunyuan_jax import hub
from hunyuan_jax.config import Config, ModelConfig
from hunyuan_jax.files import AnyPath, user_path
from hunyuan_jax.weights.storage import Place

FOLDER = "model_files"  # in a workdir
_GENERATION = "generation_config.json"
_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|"
    r"processor_config|preprocessor_config)\.json|.*\.(jinja|model|tiktoken)|(vocab|merges)\.txt"
)
_OTHER = re.compile(r"generation_config\.json|.*\.py|(LICENSE|License|NOTICE|Notice)(\..*)?")
# Each is a tokenizer by itself; a folder has one.
_VOCABULARIES = {"tokenizer.json", "hy.tiktoken"}


def is_side_file(name: str) -> bool:
    """Whether a saved model needs the file of that name to be used like the one it came from."""
    return bool(_TOKENIZER.fullmatch(name) or _OTHER.fullmatch(name))


def place_of(workdir: str | os.PathLike) -> Place:
    """Where a run keeps its files."""
    return Place(os.path.join(workdir, FOLDER))


def tokenizer_of(config: Config, place: Place) -> str:
    """What `load_tokenizer` takes for a run whose files are in `place`: its own copy, or what its
    config names if it has none.
    """
    found = _VOCABULARIES & place.sizes().keys()
    if config.data.tokenizer == "byte" or not found:
        return config.data.tokenizer
    # Of a ranks file alone, the template is the built-in one.
    is_file = config.data.tokenizer.endswith(".tiktoken")
    return place.path("hy.tiktoken") if is_file and "hy.tiktoken" in found else place.path()


def keep(workdir: str | os.PathLike, config: Config) -> None:
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
            if not _TOKENIZER.fullmatch(name) or (is_bare and name not in _VOCABULARIES)
        }
    texts = tokenizer | texts
    shutil.rmtree(os.path.join(workdir, FOLDER), ignore_errors=True)
    target = place_of(workdir)
    for name, text in texts.items():
        target.write(name, [text])


def _tokenizer_files(name: str) -> dict[str, bytes]:
    if name == "byte":
        return {}
    path = user_path(name, "config.data.tokenizer", AnyPath)
    path = hub.local_folder(path, hub.TOKENIZER_FILES)
    folder, file = os.path.split(path)
    place = Place(folder or ".")
    if file not in place.sizes():
        place, file = Place(path), ""
    elif not file.endswith(".json"):
        return {"hy.tiktoken": place.read(file)}
    # config.json says how many ids there are.
    texts = {
        n: place.read(n) for n in sorted(place.sizes()) if is_side_file(n) or n == "config.json"
    }
    return texts | ({"tokenizer.json": place.read(file)} if file else {})


def _model_files(path: str, cfg: ModelConfig) -> dict[str, bytes]:
    from hunyuan_jax.weights.open import open_model  # which opens runs

    opened = open_model(path)
    texts = {name: opened.place.read(name) for name in opened.others if is_side_file(name)}
    if _GENERATION not in texts and opened.cfg.eos_token_ids and not cfg.eos_token_ids:
        stop_ids = list(opened.cfg.eos_token_ids)
        texts[_GENERATION] = b'{"eos_token_id": %s}\n' % str(stop_ids).encode()
    return texts
