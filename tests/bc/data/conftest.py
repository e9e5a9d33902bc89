"""A tokenizer that is easy to follow by hand: a token a character."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

#: Documents of a single character each can be told apart in any window.
LETTERS = "".join(chr(0x4E00 + i) for i in range(400))
CHARACTERS = "\n =.<>'" + "".join(map(chr, range(ord("a"), ord("z") + 1))) + LETTERS

Encode = Callable[[str], Tensor]


@pytest.fixture(autouse=True)
def _no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BC_WIKITEXT2", "BC_PTB", "BC_PTB_HUB", "BC_C4", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: i for i, character in enumerate(["?", *CHARACTERS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="?")


@pytest.fixture(scope="session")
def encode() -> Encode:
    return lambda text: torch.tensor([1 + CHARACTERS.index(character) for character in text])
