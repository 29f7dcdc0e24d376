"""Fixtures that several test files share."""

import pytest

from diffseg.generator import load_generator
from diffseg.words import load_words, select_words


@pytest.fixture(scope="module")
def mini_pipeline():
    return load_generator("mini")


@pytest.fixture(scope="module")
def mini_words(mini_pipeline):
    return select_words(load_words("voc"), mini_pipeline.tokenizer)
