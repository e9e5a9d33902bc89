"""What the default options of the vision quantizers stand for."""

from __future__ import annotations

import pytest
import torch

from bc.quantizers import create, repq_vit
from bc.quantizers.base import SiteQuantizer, SiteResult
from bc.quantizers.repq_vit import fit_percentile
from bc.settings import Bits
from tests.bc.test_vision_quantizers import block_sites, error_of, output_of, site


def found(name: str, role: str, bits: str = "w4a4", **options: object) -> SiteResult:
    made = create(name, Bits.parse(bits), **options)
    assert isinstance(made, SiteQuantizer)
    return made.quantize_site(site(role))


def test_easyquant_turns_until_nothing_changes() -> None:
    roles = [s.role for s in block_sites()]
    ends, once, longer = (
        [output_of(site(role), found("easyquant", role, candidates=40, **rounds)) for role in roles]
        for rounds in ({}, {"rounds": 1}, {"rounds": 40})
    )
    assert all(torch.equal(one, two) for one, two in zip(ends, longer, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(ends, once, strict=True))
    made = create("easyquant", Bits.parse("w4a4"))
    assert isinstance(made, SiteQuantizer)
    assert (made.metric, made.options.rounds) == ("cosine", 10)  # beyond what these sites need, which is 3 at most
    assert {found("easyquant", role, candidates=40).notes["rounds"] for role in roles} <= {1, 2, 3}


def test_repq_clips_what_is_rare_and_keeps_what_is_not() -> None:
    x = torch.linspace(-1, 1, 20_000).repeat(2, 1)
    x[0, -1] = 40.0
    scale, _ = fit_percentile(x, 4)
    assert scale[0] < 3 / 15 < 40 / 15, "the one value makes 20,000 others coarse"
    assert scale[1] == pytest.approx(2 / 15, rel=0.01)


@pytest.mark.parametrize("role", ["qkv", "fc2", "matmul_av"])
def test_repqs_shares_are_tried_and_the_best_is_taken(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def outlying() -> SiteResult:
        made = create("repq_vit", Bits.parse("w4a4"))
        assert isinstance(made, SiteQuantizer)
        given = site(role)
        x = given.inputs[0].clone().repeat(40, *[1] * (given.inputs[0].dim() - 1))
        x.view(-1)[5] = 30 * x.abs().max()
        given.inputs = (x, *(value.repeat(40, *[1] * (value.dim() - 1)) for value in given.inputs[1:]))
        return made.quantize_site(given)

    best = outlying().notes
    monkeypatch.setattr(repq_vit, "SHARES", (1.0,))
    widest = outlying().notes
    assert widest["score"] == widest["score_minmax"] == best["score_minmax"] < best["score"]


def test_a_searched_default_beats_min_max() -> None:
    for name in ("easyquant", "base_ptq"):
        assert error_of(site("fc1"), found(name, "fc1")) < error_of(site("fc1"), found("minmax", "fc1"))
