"""RTN and GPTQ against the implementations of independent packages, on a small model.

Skipped where gptqmodel or auto-round is absent: ``pip install --no-build-isolation -e '.[crosscheck]'`` brings them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bc.chains import sites
from bc.models import family_of
from bc.pipeline import calibrate
from bc.quantizers import create
from bc.settings import Bits

SETTINGS = pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (3, -1), (4, 32), (3, 32), (2, 32)])
INSTALL = "is not installed (extra 'crosscheck')"
WITHIN = 0.02


@pytest.fixture
def gptqmodel() -> Any:
    return pytest.importorskip("gptqmodel.quantization", reason=f"gptqmodel {INSTALL}")


@pytest.fixture
def auto_round() -> Any:
    return pytest.importorskip("auto_round.data_type.int", reason=f"auto-round {INSTALL}")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randint(0, 96, (24, 32), generator=torch.Generator().manual_seed(1))


def agree(ours: Tensor, theirs: Tensor, atol: float = 1e-6) -> float:
    """Fraction of the entries of two matrices that are equal up to rounding."""
    return torch.isclose(ours, theirs, rtol=1e-5, atol=atol).double().mean().item()


def error(weights: dict[str, Tensor], model: nn.Module, samples: Tensor) -> float:
    """Mean squared error of the logits when a model has other weights."""
    other = copy.deepcopy(model)
    for name, weight in weights.items():
        other.get_submodule(name).weight.data = weight
    return (other(input_ids=samples).logits - model(input_ids=samples).logits).double().square().mean().item()


def rtn(model: LlamaForCausalLM, bits: int, group_size: int) -> dict[str, Tensor]:
    found = calibrate(model, create("rtn", Bits(bits, group_size=group_size)), None)
    return {name: result.weight.dequantize() for name, result in found.items()}


@SETTINGS
def test_rtn_against_gptqmodel(bits: int, group_size: int, gptqmodel: Any, model: LlamaForCausalLM) -> None:
    from gptqmodel.quantization.rtn import RTN

    config = gptqmodel.RTNConfig(bits=bits, group_size=group_size, sym=False)
    ours = rtn(model, bits, group_size)
    for name, module in sites(model, family_of(model)):
        theirs = RTN(copy.deepcopy(module), config).quantize()[0]
        assert agree(ours[name], theirs) == 1, name


@SETTINGS
def test_rtn_against_auto_round(bits: int, group_size: int, auto_round: Any, model: LlamaForCausalLM) -> None:
    ours = rtn(model, bits, group_size)
    for name, module in sites(model, family_of(model)):
        theirs = auto_round.quant_tensor_asym(module.weight.data, bits, group_size, scale_dtype=torch.float32)[0]
        assert agree(ours[name], theirs) == 1, name


def inputs_of(linears: dict[str, nn.Linear], run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """What some Linears are fed while something runs."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}

    def listen(name: str) -> Callable[[Any, Any], None]:
        return lambda module, args: inputs[name].append(args[0])

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in linears.items()]
    run()
    for handle in handles:
        handle.remove()
    return inputs


def quantize_with(
    solve: Callable[[nn.Linear, list[Tensor]], Tensor], model: LlamaForCausalLM, samples: Tensor
) -> dict[str, Tensor]:
    """Walk a model as GPTQ does, all Linears of a block at once and the next block fed by it, without our engine."""
    walked, weights = copy.deepcopy(model), {}
    for i, block in enumerate(walked.model.layers):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        inputs = inputs_of(linears, lambda: [walked(input_ids=batch) for batch in samples.split(8)])
        found = {name: solve(module, inputs[name]) for name, module in linears.items()}
        for name, weight in found.items():
            linears[name].weight.data = weight
            weights[f"model.layers.{i}.{name}"] = weight
    return weights


@SETTINGS
def test_gptq_against_gptqmodel(
    bits: int, group_size: int, gptqmodel: Any, model: LlamaForCausalLM, samples: Tensor
) -> None:
    """In blocks of one group, for inside a block of columns the other takes a group's scale before earlier updates."""
    config = gptqmodel.QuantizeConfig(
        bits=bits, group_size=group_size, sym=False, desc_act=False, act_group_aware=False, damp_percent=0.01
    )

    def solve(module: nn.Linear, inputs: list[Tensor]) -> Tensor:
        task = gptqmodel.GPTQ(copy.deepcopy(module), config)
        task.fallback = None  # never rounding to nearest in its stead
        task.quantizer.configure(perchannel=True)
        for x in inputs:
            task.add_batch(x, module(x))
        return task.quantize(blocksize=32)[0]

    theirs = quantize_with(solve, model, samples)
    found = calibrate(model, create("gptq", Bits(bits, group_size=group_size)), samples)
    ours = {name: result.weight.dequantize() for name, result in found.items()}
    assert ours.keys() == theirs.keys()
    first = [name for name in ours if name.startswith("model.layers.0.")]
    # with the very same inputs, equal but for rows in which a tie was rounded the other way
    assert all(agree(ours[name], theirs[name]) > 0.98 for name in first)
    held_out = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(2))
    for ids in (samples, held_out):
        assert error(ours, model, ids) == pytest.approx(error(theirs, model, ids), rel=WITHIN)
    assert error(ours, model, held_out) < error(rtn(model, bits, group_size), model, held_out) * 0.95
