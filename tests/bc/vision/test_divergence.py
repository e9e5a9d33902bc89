"""The divergence of predictions against SciPy's relative entropy."""

from __future__ import annotations

import pytest
import torch
from scipy.special import rel_entr
from torch import nn

from bc.divergence import Divergence
from bc.errors import UserError
from bc.pipeline import Engine
from tests.bc.vision.conftest import make

ENGINE = Engine(torch.device("cpu"), 3)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_it_is_the_mean_relative_entropy(size: int) -> None:
    (one, few), (two, _) = make("vit"), make("vit")
    for parameter in two.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    images = torch.randn(7, *few.shape[1:], generator=torch.Generator().manual_seed(3))
    divergence = Divergence(one, images, Engine(torch.device("cpu"), size))
    p, q = (model(images).double().softmax(1).numpy() for model in (one, two))
    assert divergence(two) == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-4)
    assert divergence(two) > 0 and divergence(one) == pytest.approx(0, abs=1e-7)


def test_what_cannot_be_compared_is_refused() -> None:
    model, images = make("vit")
    with pytest.raises(UserError, match=r"^held_out: there are no images"):
        Divergence(model, images[:0], ENGINE)
    divergence = Divergence(model, images, ENGINE)
    head: nn.Module = model.get_submodule("head")
    head.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^head: "):
        divergence(model)
