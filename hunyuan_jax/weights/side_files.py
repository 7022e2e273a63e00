"""Files of a model beside its weights: tokenizer, chat template, generation config, code.

A run keeps those of what it came from in its workdir, so that a workdir can be moved, and what is
exported from it is whole.
"""

import re

from hunyuan_jax.config import Config
from hunyuan_jax.storage import Place

FOLDER = "model_files"  # in a workdir
TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|"
    r"processor_config|preprocessor_config)\.json|.*\.(jinja|model|tiktoken)|(vocab|merges)\.txt"
)
_OTHER = re.compile(r"generation_config\.json|.*\.py|(LICENSE|License|NOTICE|Notice)(\..*)?")
# Each is a tokenizer by itself; a folder has one.
VOCABULARIES = {"tokenizer.json", "hy.tiktoken"}


def is_side_file(name: str) -> bool:
    """Whether a saved model needs the file of that name to be used like the one it came from."""
    return bool(TOKENIZER.fullmatch(name) or _OTHER.fullmatch(name))


def tokenizer_of(config: Config, place: Place) -> Place | str:
    """What `load_tokenizer` takes for a run whose files are in `place`: its own copy, or what its
    config names if it has none.
    """
    found = VOCABULARIES & set(place.names())
    if config.data.tokenizer == "byte" or not found:
        return config.data.tokenizer
    # Of a ranks file alone, the template is the built-in one.
    is_file = config.data.tokenizer.endswith(".tiktoken")
    return place.inside("hy.tiktoken") if is_file and "hy.tiktoken" in found else place
