"""What the quantizers of a vision model are given: every site's samples in their order, and drawn labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bc.chains import VisionChain
from bc.site_calibration import output_gradients, site_samples
from bc.vision import sites, wrap
from tests.bc.vision.conftest import make

CPU = torch.device("cpu")
Case = tuple[nn.Module, Tensor]


def seen_alone(model: nn.Module, name: str, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and output of one module in a forward of the whole model on all images."""
    seen: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, output: seen.extend((args, output)))
    model(images)
    handle.remove()
    return seen[0], seen[1]


def test_one_pass_gives_each_site_what_a_pass_of_its_own_would(wrapped: Case) -> None:
    model, few = wrapped
    images = torch.randn(7, *few.shape[1:], generator=torch.Generator().manual_seed(1))
    chain = VisionChain(model)
    stream = chain.capture(images, 3, CPU, "host")  # the last batch is smaller
    hidden = images
    for unit in chain.units:
        gradients = {site.name: torch.full((1,), float(k)) for k, site in enumerate(unit.sites)}
        found, outputs = site_samples(unit, stream, gradients, CPU)
        assert [sample.name for sample in found] == [site.name for site in unit.sites]
        for k, sample in enumerate(found):
            inputs, output = seen_alone(model, sample.name, images)
            assert len(inputs) == len(sample.inputs)
            for one, two in zip((*sample.inputs, sample.output), (*inputs, output), strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
            assert sample.gradient is not None and sample.gradient.item() == k
        hidden = unit.module(hidden)
        assert [len(output) for output in outputs] == [3, 3, 1]
        torch.testing.assert_close(torch.cat(outputs), hidden, atol=1e-5, rtol=1e-4)
        for b, output in enumerate(outputs):
            stream.cache[b] = output


def test_the_labels_of_fisher_are_drawn_from_the_models_own_distribution() -> None:
    model, images = make("vit")
    head = sites(wrap(model))[-1].name
    image, count = images[:1], 600
    probabilities = model(image).softmax(-1)[0]
    assert probabilities.max() < 0.8 and (probabilities > 0.05).sum() >= 2
    batches = list(image.expand(count, *image.shape[1:]).split(200))
    drawn = []
    for _ in range(2):
        (*_, last) = output_gradients(VisionChain(model), "fisher", batches, CPU)
        drawn.append((probabilities - last[head]).argmax(1))  # softmax − one-hot
    assert torch.equal(*drawn), "the draw has a seed"
    frequencies = torch.bincount(drawn[0], minlength=len(probabilities)) / count
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequencies - probabilities).abs() < 4 * deviation + 1e-3).all()
    assert len({tuple(part.tolist()) for part in drawn[0].split(200)}) == 3, "batches have draws of their own"
