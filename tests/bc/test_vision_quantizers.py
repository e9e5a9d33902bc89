"""The weight-and-activation quantizers on the sites of a random transformer block."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bc.activation_grids import Affine, LogSqrt2, Noisy, ReparametrisedAffine, Symmetric, TwinGELU, TwinSoftmax
from bc.activations import ActivationQuantizer
from bc.errors import QuantizationError
from bc.grid import QuantizedWeight
from bc.quantizers import available, create
from bc.quantizers.apq_vit import APQViT, block_score
from bc.quantizers.base import SiteQuantizer, SiteResult, SiteSamples
from bc.quantizers.repq_vit import ReparametrisedWeight, reparametrise
from bc.settings import Bits

NAMES = ("minmax", "base_ptq", "easyquant", "ptq4vit", "apq_vit", "noisyquant", "repq_vit")
FAST: dict[str, dict[str, Any]] = {
    "base_ptq": {"candidates": 20},
    "easyquant": {"candidates": 20, "rounds": 3},
    "ptq4vit": {"candidates": 30, "rounds": 2},
    "apq_vit": {"candidates": 20, "rounds": 2, "block_candidates": 3},
}
IMAGES, TOKENS, WIDTH, HEADS = 6, 17, 24, 3


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Block(nn.Module):
    """A transformer block whose attention products are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.matmul_qk, self.matmul_av = Product(), Product()

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(images, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attention = self.matmul_qk(q * (width // HEADS) ** -0.5, k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj(self.matmul_av(attention, v).transpose(1, 2).reshape(x.shape))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@cache
def make_block() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    for norm in (block.norm1, block.norm2):
        norm.weight.data = torch.rand(WIDTH) + 0.5
        norm.weight.data[3], norm.weight.data[11] = 15.0, 8.0  # channels that are much larger than the others
        norm.bias.data = torch.randn(WIDTH) * 0.5
    for linear in (block.qkv, block.fc1):
        linear.weight.data[:, [3, 11]] *= 0.1
    block.qkv.weight.data[: 2 * WIDTH] *= 2.5  # attention that prefers few tokens
    return block, torch.randn(IMAGES, TOKENS, WIDTH)


@cache
def _block_sites() -> tuple[SiteSamples, ...]:
    block, x = make_block()
    sites = []
    for name in ("qkv", "matmul_qk", "matmul_av", "proj", "fc1", "fc2"):
        module = getattr(block, name)
        seen: dict[str, Any] = {}

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, seen: dict[str, Any] = seen) -> None:
            seen["args"], seen["out"] = args, out

        handle = module.register_forward_hook(hook)
        block(x)
        handle.remove()
        generator = torch.Generator().manual_seed(len(name))
        gradient = torch.randn(seen["out"].shape, generator=generator)
        linear = isinstance(module, nn.Linear)

        def forward(w: Tensor | None, inputs: tuple[Tensor, ...], module: nn.Module = module) -> Tensor:
            return module(*inputs) if w is None else F.linear(inputs[0], w, module.bias)  # type: ignore[arg-type]

        sites.append(
            SiteSamples(
                name=f"blocks.0.{name}",
                kind="linear" if linear else "matmul",
                role=name,
                heads=HEADS if name in ("qkv", "matmul_qk", "matmul_av") else 0,
                weight=module.weight if linear else None,
                bias=module.bias if linear else None,
                inputs=seen["args"],
                output=seen["out"],
                gradient=gradient,
                forward=forward,
                norm={"qkv": block.norm1, "fc1": block.norm2}.get(name),
            )
        )
    return tuple(sites)


def block_sites() -> list[SiteSamples]:
    return [copy.copy(site) for site in _block_sites()]


def patch_site() -> SiteSamples:
    g = torch.Generator().manual_seed(7)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((IMAGES, 3, 8, 8), (WIDTH, 3, 4, 4), (WIDTH,)))

    def forward(w: Tensor | None, inputs: tuple[Tensor, ...]) -> Tensor:
        return F.conv2d(inputs[0], weight if w is None else w, bias, stride=4)

    output = forward(None, (x,))
    return SiteSamples(
        "patch_embed.proj", "conv", "patch_embed", 0, weight, bias, (x,), output, torch.ones_like(output), forward
    )


def head_site() -> SiteSamples:
    g = torch.Generator().manual_seed(8)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((IMAGES, WIDTH), (10, WIDTH), (10,)))
    output = F.linear(x, weight, bias)

    gradient = torch.ones_like(output)
    return SiteSamples(
        "head", "linear", "head", 0, weight, bias, (x,), output, gradient, lambda w, x: F.linear(x[0], w, bias)
    )


def output_of(site: SiteSamples, result: SiteResult) -> Tensor:
    inputs = tuple(q(x) for q, x in zip(result.inputs, site.inputs, strict=True))
    weight = site.weight
    if result.weight is not None:
        assert weight is not None
        weight = result.weight.dequantize().reshape(weight.shape)
    return site.forward(weight, inputs)


def error_of(site: SiteSamples, result: SiteResult) -> float:
    """Relative squared error of the output."""
    return float((output_of(site, result) - site.output).square().sum() / site.output.square().sum())


def evaluate(results: dict[str, SiteResult]) -> Tensor:
    """The block with some sites quantized."""
    block, x = make_block()
    block = copy.deepcopy(block)
    for name, result in results.items():
        module = getattr(block, name.removeprefix("blocks.0."))
        if result.weight is not None:
            module.weight.data = result.weight.dequantize()
        quantizers = result.inputs
        module.register_forward_pre_hook(
            lambda _, args, quantizers=quantizers: tuple(q(x) for q, x in zip(quantizers, args, strict=True))
        )
    return block(x)


def quantizer(name: str, bits: str | Bits, **options: Any) -> SiteQuantizer:
    made = create(name, Bits.parse(bits), **{**FAST.get(name, {}), **options})
    assert isinstance(made, SiteQuantizer)
    return made


def site(role: str) -> SiteSamples:
    return next(s for s in block_sites() if s.role == role)


@cache
def quantized(name: str, bits: str) -> dict[str, SiteResult]:
    q = quantizer(name, bits)
    results = q.quantize_block(block_sites(), evaluate)
    return results | {s.name: q.quantize_site(s) for s in (patch_site(), head_site())}


def test_all_are_found() -> None:
    assert all(available()[name].kind == "weight_activation" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a4"])
def test_every_site_gets_a_valid_result(name: str, bits: str) -> None:
    results = quantized(name, bits)
    for s in [*block_sites(), patch_site(), head_site()]:
        result = results[s.name]
        assert len(result.inputs) == len(s.inputs)
        assert (result.weight is None) == (s.kind == "matmul")
        assert "metric" in result.notes and "weight_granularity" in result.notes
        for q, x in zip(result.inputs, s.inputs, strict=True):
            out = q(x)
            assert out.shape == x.shape and out.dtype == x.dtype and bool(torch.isfinite(out).all())
            if s.role == "patch_embed":
                assert type(q) is ActivationQuantizer and torch.equal(out, x)
            elif not isinstance(q, Noisy | ReparametrisedAffine):
                groups = out.movedim(1, 0) if s.kind == "matmul" else [out]
                assert all(len(g.unique()) <= 2 ** int(bits[-1]) for g in groups)
        if result.weight is not None and s.weight is not None:
            assert result.weight.dequantize().shape == s.weight.flatten(1).shape
            assert result.weight.storage_bits() > 0
        if name != "minmax":
            assert result.notes["score"] >= result.notes["score_minmax"]


@pytest.mark.parametrize("name", NAMES)
def test_error_falls_with_bits(name: str) -> None:
    total = []
    for bits in ("w4a4", "w6a6", "w8a8"):
        results = quantized(name, bits)
        # More bits extend the range of a logarithmic grid, not its resolution, so that its error stays.
        sites = [s for s in block_sites() if (name, s.role) != ("repq_vit", "matmul_av")]
        total.append(sum(error_of(s, results[s.name]) for s in [*sites, patch_site(), head_site()]))
    assert total[0] > 4 * total[1] > 16 * total[2]
    assert total[2] < 0.02
    blocks = [
        float((evaluate({k: v for k, v in quantized(name, b).items() if "blocks" in k}) - evaluate({})).square().sum())
        for b in ("w4a4", "w6a6", "w8a8")
    ]
    assert blocks[0] > blocks[1] > blocks[2]


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_free_of_side_effects(name: str) -> None:
    before = [[x.clone() for x in s.inputs] + [s.output.clone()] for s in block_sites()]
    first, again = quantized(name, "w4a4"), quantizer(name, "w4a4").quantize_block(block_sites(), evaluate)
    for key, result in again.items():
        assert first[key].notes == result.notes
        if result.weight is not None:
            assert torch.equal(first[key].weight.dequantize(), result.weight.dequantize())  # type: ignore[union-attr]
        for a, b in zip(first[key].inputs, result.inputs, strict=True):
            assert type(a) is type(b)
            assert all(torch.equal(u, v) for u, v in zip(a.buffers(), b.buffers(), strict=True))
    for old, s in zip(before, block_sites(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, [*s.inputs, s.output], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_side_float(name: str) -> None:
    for role in ("fc1", "fc2", "matmul_av"):
        s = site(role)
        weights_only = quantizer(name, Bits(4, 16)).quantize_site(s)
        assert all(type(q) is ActivationQuantizer for q in weights_only.inputs)
        assert (weights_only.weight is None) == (s.weight is None)
        activations_only = quantizer(name, Bits(16, 4)).quantize_site(s)
        assert activations_only.weight is None
        assert all(type(q) is not ActivationQuantizer for q in activations_only.inputs)
        assert error_of(s, activations_only) > 0
        nothing = quantizer(name, Bits(16, 16)).quantize_site(s)
        torch.testing.assert_close(output_of(s, nothing), s.output)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("role", ["qkv", "fc2", "matmul_qk", "matmul_av", "head"])
def test_zero_and_constant_inputs(name: str, value: float, role: str) -> None:
    s = head_site() if role == "head" else site(role)
    s.inputs = tuple(torch.full_like(x, value) for x in s.inputs)
    s.output = s.forward(s.weight, s.inputs)
    result = quantizer(name, "w8a8").quantize_site(s)
    for q, x in zip(result.inputs, s.inputs, strict=True):
        torch.testing.assert_close(q(x), x, rtol=0.01, atol=0.02)
    out = output_of(s, result)
    assert bool(torch.isfinite(out).all())
    if value == 0:
        torch.testing.assert_close(out, s.output, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("granularity", ["paper", "row", "tensor"])
def test_weight_granularity(granularity: str) -> None:
    for name in ("base_ptq", "ptq4vit", "noisyquant"):
        q = quantizer(name, "w4a4", weight_granularity=granularity)
        for s in (site("qkv"), site("fc1"), patch_site()):
            weight = q.quantize_site(s).weight
            assert isinstance(weight, QuantizedWeight) and s.weight is not None
            rows = len(s.weight)
            scales = {"row": rows, "tensor": 1}.get(granularity, {"qkv": 3, "patch_embed": rows}.get(s.role, 1))
            assert len(weight.scale.unique()) == scales
            if scales == 3:
                assert all(len(part.unique()) == 1 for part in weight.scale.chunk(3))


def test_positive_weights_are_not_clipped() -> None:
    s = site("proj")
    assert s.weight is not None
    s.weight = s.weight.abs() + 0.1
    s.output = s.forward(s.weight, s.inputs)
    weight = quantizer("minmax", Bits(4, 16), symmetric=True).quantize_site(s).weight
    assert isinstance(weight, QuantizedWeight)
    assert bool(((weight.dequantize() - s.weight).abs() <= weight.scale / 2 * 1.0001).all())


def test_grids_of_the_roles() -> None:
    p, a = quantized("ptq4vit", "w4a4"), quantized("apq_vit", "w4a4")
    assert isinstance(p["blocks.0.fc2"].inputs[0], TwinGELU)
    assert isinstance(p["blocks.0.matmul_av"].inputs[0], TwinSoftmax)
    assert p["blocks.0.matmul_av"].inputs[1].scale.shape == (HEADS, 1, 1)
    assert [tuple(q.scale.shape) for q in p["blocks.0.matmul_qk"].inputs] == [(HEADS, 1, 1)] * 2
    softmax = a["blocks.0.matmul_av"].inputs[0]
    top = site("matmul_av").inputs[0].max()
    assert isinstance(softmax, Affine) and float(softmax(top)) == pytest.approx(float(top))
    assert isinstance(quantized("base_ptq", "w4a4")["blocks.0.matmul_av"].inputs[0], Symmetric)
    r = quantized("repq_vit", "w4a4")
    assert isinstance(r["blocks.0.matmul_av"].inputs[0], LogSqrt2)
    for name in ("blocks.0.qkv", "blocks.0.fc1"):
        assert isinstance(r[name].weight, ReparametrisedWeight)


@pytest.mark.parametrize("bits", [3, 4])
def test_twin_beats_uniform_after_softmax_and_gelu(bits: int) -> None:
    for role in ("matmul_av", "fc2"):
        s = site(role)
        twin, uniform = (
            quantizer("ptq4vit", Bits(16, bits), metric="mse", twin=t).quantize_site(s) for t in (True, False)
        )
        assert error_of(s, twin) < error_of(s, uniform)


def test_repq_beats_per_tensor_with_large_channels() -> None:
    for role in ("qkv", "fc1"):
        s = site(role)
        channel, tensor = (quantizer("repq_vit", Bits(16, 4), norm=n).quantize_site(s) for n in ("channel", "tensor"))
        assert error_of(s, channel) < 0.5 * error_of(s, tensor)
        both = [quantizer("repq_vit", Bits(6, 4), norm=n).quantize_site(s) for n in ("channel", "tensor")]
        assert error_of(s, both[0]) < error_of(s, both[1])


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
@pytest.mark.parametrize("role", ["qkv", "fc1"])
def test_reparametrised_model_equals_the_channelwise_one(bits: str, role: str) -> None:
    s = site(role)
    result = quantizer("repq_vit", bits).quantize_site(s)
    grid, weight, norm = result.inputs[0], result.weight, s.norm
    assert isinstance(grid, ReparametrisedAffine) and isinstance(weight, ReparametrisedWeight) and norm is not None
    _, x = make_block()
    gamma, beta, new_weight, new_bias = reparametrise(norm.weight, norm.bias, weight.dequantize(), s.bias, grid)
    torch.testing.assert_close(new_weight, weight.on_grid().dequantize(), rtol=1e-5, atol=1e-6)
    # Inputs away from the edges between two codes, which fp32 may round either way.
    normed = F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, norm.eps)
    position = normed / grid.scale
    normed = torch.where(((position - position.floor()) - 0.5).abs() < 1e-3, position.round() * grid.scale, normed)
    moved = (normed - norm.bias) / norm.weight * gamma + beta
    tensor = Affine(grid.tensor_scale, grid.tensor_zero, int(bits[-1]))  # one scale and one zero point
    written_out = F.linear(tensor(moved), new_weight, new_bias)
    channelwise = F.linear(grid(normed), weight.dequantize(), s.bias)
    torch.testing.assert_close(written_out, channelwise, rtol=1e-5, atol=1e-5 * float(channelwise.abs().max()))
    # Without quantization the new norm and Linear are the old ones.
    plain = reparametrise(norm.weight, norm.bias, s.weight, s.bias, grid)  # type: ignore[arg-type]
    y = F.linear(F.layer_norm(x, (WIDTH,), plain[0], plain[1], norm.eps), plain[2], plain[3])
    expected = F.linear(F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, norm.eps), s.weight, s.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("base", ["linear", "ptq4vit"])
def test_noise_never_raises_the_error(base: str) -> None:
    used = 0
    for s in block_sites():
        result = quantizer("noisyquant", "w4a4", base=base).quantize_site(s)
        if s.kind == "matmul":
            assert not any(isinstance(q, Noisy) for q in result.inputs)
            continue
        below = {"linear": "easyquant", "ptq4vit": "ptq4vit"}[base]
        plain = create(below, Bits(4, 4)).quantize_site(s)  # type: ignore[attr-defined]
        assert error_of(s, result) <= error_of(s, plain) * (1 + 1e-5)
        assert float((output_of(s, result) - s.output).square().mean()) == pytest.approx(-result.notes["noise_score"])
        used += isinstance(result.inputs[0], Noisy)
    assert used


def test_block_search_never_lowers_the_block_score() -> None:
    sites, q = block_sites(), quantizer("apq_vit", "w4a4", block_candidates=4, block_rounds=2)
    assert isinstance(q, APQViT)
    calls: list[float] = []

    def counted(results: dict[str, SiteResult]) -> Tensor:
        out = evaluate(results)
        if results:
            assert set(results) == {s.name for s in sites}
            calls.append(block_score(out, evaluate({}), sites[-1].gradient, q.options.keep))
        return out

    results = q.quantize_block(sites, counted)
    final = block_score(evaluate(results), evaluate({}), sites[-1].gradient, q.options.keep)
    assert final == pytest.approx(max(calls)) and final >= calls[0] and final >= calls[1]
    notes = results["blocks.0.fc2"].notes
    assert notes["score"] == pytest.approx(final) and notes["score"] > notes["score_minmax"]


def test_block_without_gradient_is_refused_by_name() -> None:
    sites = block_sites()
    sites[-1].gradient = torch.ones(3)
    q = quantizer("apq_vit", "w4a4")
    with pytest.raises(QuantizationError, match=r"blocks\.0\.fc2"):
        q.quantize_block(sites, evaluate)
