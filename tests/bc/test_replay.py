"""The replayed stack of blocks is the model itself, exactly."""

from __future__ import annotations

import pytest
import torch

from bc.calibration import Stream, batches, capture, logits
from bc.chains import block_list
from bc.models import family_of
from tests.conftest import MAKERS, tiny_model

CPU = torch.device("cpu")


def replay(model, samples, batch_size: int, store: str = "host") -> Stream:
    family = family_of(model)
    stream = capture(model, family, samples, batch_size, CPU, store)
    for block in block_list(model, family):
        stream.advance(block)
    return stream


BOTH = [
    (name, attention) for name in MAKERS for attention in ("eager", "sdpa") if (name, attention) != ("bloom", "sdpa")
]


@pytest.mark.parametrize(("name", "attention"), BOTH)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_replay_equals_the_models_own_logits(name, attention, batch_size, token_ids):
    model = tiny_model(name, attention)
    stream = replay(model, token_ids, batch_size)
    for i, ids in enumerate(token_ids.split(batch_size)):
        assert torch.equal(logits(model, family_of(model), stream, i), model(input_ids=ids).logits)


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_replay_with_left_padding(name, attention, token_ids):
    model = tiny_model(name, attention)
    mask = torch.ones_like(token_ids[:2])
    mask[0, :5] = 0
    sample = {"input_ids": token_ids[:2], "attention_mask": mask}
    stream = replay(model, [sample], 2)
    assert torch.equal(logits(model, family_of(model), stream, 0), model(**sample).logits)
    assert stream.calls[0].positions[0].tolist() == [0] * 5 + list(range(15))
    assert stream.calls[0].positions[1].tolist() == list(range(20))


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_stores_hold_the_same_activations(store, token_ids):
    model = tiny_model("llama")
    stream = replay(model, token_ids, 2, store)
    reference = replay(model, token_ids, 2)
    assert all(torch.equal(stream.cache[i], reference.cache[i]) for i in range(len(stream)))
    assert stream.cache.nbytes == token_ids.numel() * 32 * 4


def test_a_fork_goes_its_own_way(token_ids):
    model = tiny_model("opt")
    stream = capture(model, family_of(model), token_ids, 3, CPU)
    fork = stream.fork()
    stream.advance(block_list(model, family_of(model))[0])
    assert not torch.equal(stream.cache[0], fork.cache[0])


def test_batches_never_mix_lengths():
    samples = [torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.zeros(7, dtype=torch.long)]
    assert [tuple(b["input_ids"].shape) for b in batches(samples, 4)] == [(2, 5), (1, 7)]
    assert [tuple(b["input_ids"].shape) for b in batches(samples, 1)] == [(1, 5), (1, 5), (1, 7)]


def test_equal_arguments_are_kept_once(token_ids):
    model = tiny_model("llama", "eager")
    stream = capture(model, family_of(model), token_ids, 2, CPU)
    assert len({id(c) for c in stream.calls}) == 1
