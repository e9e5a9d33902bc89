"""Biases that depend on the position, in generation with a KV cache: the same as full forwards without one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bc
from bc.compensation import BiasCompensation
from bc.settings import Compensation
from tests.conftest import MAKERS, VOCABULARY, tiny_model

FAMILIES = list(MAKERS)
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
FITTED = 8  # tokens that the biases were fitted on
SETTINGS = {
    "channel": Compensation(("layer", "model"), "channel", dtype="float32"),
    "sink": Compensation(("layer",), "sink", sink_positions=3, dtype="float32"),
    "positional": Compensation(("layer", "attention", "mlp"), "positional", dtype="float32"),
    "paper": Compensation(("layer", "block", "model"), "positional", dtype="float32"),
}


def random_ids(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def compensated(name: str, key: str) -> nn.Module:
    """A compensated model, its biases enlarged at random so that a wrong row cannot go unnoticed."""
    model = tiny_model(name)
    bc.quantize(model, "rtn", "w4", SETTINGS[key], random_ids(4, FITTED, 0), device="cpu")
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, BiasCompensation):
            module.bias += 0.2 * torch.randn(module.bias.shape, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding by full forwards of the growing sequence."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(SETTINGS))
@pytest.mark.parametrize("prompt", [1, 5, 13])
def test_greedy_generation_with_a_cache_equals_full_forwards(name, key, prompt):
    """Also past the fitted length, in the middle of the generation or from the prompt on."""
    model = compensated(name, key)
    ids = random_ids(2, prompt, 3)
    found = model.generate(ids, max_new_tokens=14, do_sample=False, use_cache=True)
    assert torch.equal(found, greedy(model, ids, 14))
    assert torch.equal(model.generate(ids, max_new_tokens=14, do_sample=False, use_cache=False), found)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(SETTINGS))
def test_left_padding_in_a_batch_equals_each_prompt_alone(name, key):
    model = compensated(name, key)
    prompts = [random_ids(1, n, n)[0] for n in (2, 7, 11, 11)]
    longest = max(map(len, prompts))
    ids, mask = torch.full((4, longest), 0), torch.zeros(4, longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, prompt in enumerate(prompts):
            alone = model(input_ids=prompt[None]).logits[0]
            assert torch.allclose(together[row, longest - len(prompt) :], alone, atol=1e-4)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(found[row, longest - len(prompt) :], greedy(model, prompt[None], 10)[0])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(SETTINGS))
@pytest.mark.parametrize("cuts", [[1] * 15, [6, 1, 1, 4, 3], [9, 6]])
@torch.no_grad()
def test_incremental_logits_equal_a_full_forward(name, key, cuts):
    model = compensated(name, key)
    ids = random_ids(2, 15, 5)
    full = model(input_ids=ids).logits
    past, done, parts = None, 0, []
    for cut in cuts:
        step = model(input_ids=ids[:, done : done + cut], past_key_values=past, use_cache=True)
        past, done = step.past_key_values, done + cut
        parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5 * max(1, float(full.abs().max())))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_incremental_logits_with_left_padding(name):
    model = compensated(name, "paper")
    ids = random_ids(2, 14, 6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def run(start: int, stop: int, past: object = None):
        more = {"position_ids": positions[:, start:stop]} if name == "llama" else {}
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        return model(**inputs, past_key_values=past, use_cache=True, **more)

    full = run(0, 14).logits
    parts, past = [], None
    for start, stop in ((0, 6), *((t, t + 1) for t in range(6, 14))):
        step = run(start, stop, past)
        parts, past = [*parts, step.logits], step.past_key_values
    found = torch.cat(parts, 1)
    assert torch.allclose(found[1], full[1], atol=1e-4)
    assert torch.allclose(found[0, 4:], full[0, 4:], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_longer_sequences_follow_the_documented_rule(name):
    """A table written out to the full length by hand gives the same logits."""
    model = compensated(name, "paper")
    longer = copy.deepcopy(model)
    for module in longer.modules():
        if isinstance(module, BiasCompensation):
            beyond = module.bias[1:].mean(0, keepdim=True)
            module.bias = torch.cat([module.bias, beyond.expand(40 - FITTED, -1)])
    ids = random_ids(2, 40, 7)
    assert torch.allclose(model(input_ids=ids).logits, longer(input_ids=ids).logits, atol=1e-5)
    short = model(input_ids=ids[:, :5]).logits  # a shorter input takes the first positions
    assert torch.allclose(short, model(input_ids=ids).logits[:, :5], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_of_the_last_token_only(name):
    model = compensated(name, "paper")
    ids = random_ids(2, 6, 8)
    last = model(input_ids=ids, logits_to_keep=1).logits if name != "bloom" else model(input_ids=ids).logits[:, -1:]
    assert torch.allclose(last, model(input_ids=ids).logits[:, -1:], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_masks_given_by_position_are_read(name):
    model = compensated(name, "positional")
    ids = random_ids(2, 7, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, None, mask).logits if name == "bloom" else model(ids, mask).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_embeddings_in_place_of_tokens(name):
    model = compensated(name, "positional")
    ids = random_ids(2, 10, 9)
    embedded = model.get_input_embeddings()(ids)
    assert torch.allclose(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_part_called_alone_does_not_take_an_earlier_calls_positions(name):
    """After a generation the last position must not be left behind for the decoder called by itself."""
    model = compensated(name, "positional")
    ids = random_ids(1, 6, 8)
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.allclose(model.base_model(ids).last_hidden_state, expected, atol=1e-5)
    with pytest.raises(IndexError):
        model(input_ids=ids + VOCABULARY)  # a forward that fails leaves nothing behind either
    assert torch.allclose(model.base_model(ids[:, :2]).last_hidden_state, expected[:, :2], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_deep_copy_generates_by_itself(name):
    model = compensated(name, "paper")
    twin = copy.deepcopy(model)
    ids = random_ids(1, 5, 3)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model(input_ids=random_ids(3, 20, 1))  # the original's positions are its own
    assert torch.equal(twin.generate(ids, max_new_tokens=8, do_sample=False), expected)
    for module in twin.modules():
        if isinstance(module, BiasCompensation):
            module.bias.zero_()
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_beam_search_runs_and_agrees_without_a_cache(name):
    model = compensated(name, "positional")
    ids = random_ids(2, 4, 3)
    a, b = (model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)
