"""A small random model that answers, shared by the tests of this folder."""

import pytest

from hunyuan_jax.evals.answers import Answers
from hunyuan_jax.infer.request import Limits
from hunyuan_jax.infer.text import LM
from hunyuan_jax.tokenizer import load_tokenizer
from support import serving

MAX_LENGTH = 96


@pytest.fixture(scope="session")
def lm():
    return LM(serving.model(), load_tokenizer(str(serving.FOLDER)))


@pytest.fixture(scope="session")
def answers(lm):
    return Answers(lm, Limits(max_rows=2, max_context=MAX_LENGTH, page_size=8, chunk_size=16))
