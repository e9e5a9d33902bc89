"""Search of quantization parameters by the error of a site's output, over lists of candidates.

A site is the product of two operands: a weight and an input, or the two inputs of an attention matmul. Each operand has
a list of candidate parameters, of which the first is min-max, for each of its groups (the tensor, the q, k and v rows,
the rows, the heads). The operands are searched in turns, each with the other as chosen so far. The output falls into
parts that match the finest groups, and the score of a candidate is taken part by part, so that all groups choose at
once; the score of the site is the mean over its parts. As the current choice is always among the candidates, no step
lowers the score, and the end is never worse than min-max.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bc.errors import QuantizationError
from bc.quantizers.base import SiteSamples

Metric = Literal["fisher", "mse", "cosine", "self_kl"]
GRADIENT_METRICS = ("fisher", "self_kl")
COPIES = 3  # of the output that are alive while a candidate is scored


def scale_factors(low: float, high: float, count: int) -> Tensor:
    """Factors of the min-max scale: 1 first, then low + i · (high − low) / count, i = 0 … count − 1."""
    return torch.cat([torch.ones(1), low + torch.arange(count) * ((high - low) / count)])


class Scorer:
    """Scores candidates' outputs of one site; higher is better.

    The scores, each a mean over the elements of a part: ``mse`` −(y − ŷ)²; ``fisher`` and ``self_kl`` −(g · (y − ŷ))²
    with g the site's gradient; ``cosine`` the cosine of the angle between the part's y and ŷ, over all images.

    Attributes:
        parts: Number of parts of the output: equal runs of output channels, or of heads.
    """

    def __init__(self, site: SiteSamples, metric: str, parts: int, memory_mib: int) -> None:
        self.site = site
        self.metric = metric
        self.parts = parts
        self.budget = memory_mib * 2**20
        self.gradient = site.gradient if metric in GRADIENT_METRICS else None
        if metric in GRADIENT_METRICS and (site.gradient is None or not bool(site.gradient.any())):
            raise QuantizationError(
                f"{site.name}: the {metric} metric needs a gradient at the output, and it is "
                f"{'missing' if site.gradient is None else 'zero everywhere'}; choose metric=mse or cosine"
            )
        self.energy = self.by_part(site.output.square().unsqueeze(0))

    def by_part(self, values: Tensor) -> Tensor:
        """Sum values of shape (candidates, *output) over all but candidates and parts, fp64."""
        count = len(values)
        if self.site.kind == "linear":
            shaped = values.reshape(count, -1, self.parts, values.shape[-1] // self.parts)
            return shaped.sum((1, 3)).double()
        images, channels = values.shape[1:3]
        return values.reshape(count, images, self.parts, channels // self.parts, -1).sum((1, 3, 4)).double()

    def score(self, produce: Callable[[slice, slice], Tensor], count: int, size: int, fixed: int = 0) -> Tensor:
        """Scores of candidates.

        Args:
            produce: (candidates, images) ↦ outputs of shape (candidates, images, …).
            count: Number of candidates.
            size: Elements of an operand that a candidate needs for each image, besides the output.
            fixed: Elements that it needs whatever the number of images.

        Returns:
            fp64, shape (candidates, parts).
        """
        output = self.site.output
        number = output.element_size()
        image = number * (COPIES * output[0].numel() + size)
        images = max(1, min(len(output), self.budget // image))
        step = max(1, min(count, self.budget // (image * images + number * fixed)))
        square = output.new_zeros(count, self.parts, dtype=torch.float64)
        inner = torch.zeros_like(square)
        for first in range(0, len(output), images):
            batch = slice(first, first + images)
            target = output[batch]
            for start in range(0, count, step):
                chosen = slice(start, min(start + step, count))
                error = produce(chosen, batch).sub_(target)
                if self.metric == "cosine":
                    inner[chosen] += self.by_part(error * target)
                if self.gradient is not None:
                    error = error.mul_(self.gradient[batch])
                square[chosen] += self.by_part(error.square_())
        return self.finish(square, inner)

    def finish(self, square: Tensor, inner: Tensor) -> Tensor:
        """Scores from the sums of ‖r‖² (weighted by the gradient) and r · y, r = ŷ − y."""
        if self.metric != "cosine":
            return -square / (self.site.output.numel() / self.parts)
        # The sine is free of cancellation where the cosine is nearly 1: sin² = (‖y‖² ‖r‖² − (r·y)²) / (‖y‖² ‖ŷ‖²).
        energy = self.energy.expand_as(square)
        length = (energy + 2 * inner + square).clamp(min=0)
        denominator = energy * length
        safe = denominator.clamp(min=torch.finfo(torch.float64).tiny)
        cosine = ((energy + inner) / safe.sqrt()).clamp(-1, 1)
        sine = ((energy * square - inner.square()) / safe).clamp(min=0)
        near = 1 - sine / (1 + cosine.clamp(min=0))
        score = torch.where(cosine > 0.5, near, cosine)
        # Where a part of the output is zero it has no direction: right if the candidate is zero too, else wrong.
        return torch.where(denominator > 0, score, (energy + length == 0).to(score))


@dataclass
class Operand:
    """One factor of a site's product, with its candidates.

    Attributes:
        value: The float operand; images first for an input.
        candidates: Parameters, shape (candidates, groups); the first row is min-max. None leaves the operand float.
        shape: Shape of one candidate's parameters next to the value, with −1 for the groups.
        quantize: (values, parameters), which broadcast, ↦ quantized values.
        build: Parameters (groups,) ↦ what a :class:`~bc.quantizers.base.SiteResult` holds.
        choice: Chosen candidate of each group.
    """

    value: Tensor
    candidates: Tensor | None
    shape: tuple[int, ...] = ()
    quantize: Callable[[Tensor, Tensor], Tensor] = lambda value, _: value
    build: Callable[[Tensor], Any] = lambda _: None
    choice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        groups = 1 if self.candidates is None else self.candidates.shape[1]
        self.choice = torch.zeros(groups, dtype=torch.long, device=self.value.device)

    @property
    def chosen(self) -> Tensor:
        """Parameters of the current choice, shape (groups,)."""
        assert self.candidates is not None
        return self.candidates.gather(0, self.choice.unsqueeze(0))[0]

    def apply(self, parameters: Tensor, images: slice = slice(None)) -> Tensor:
        """Quantized values for several parameters (candidates, groups): shape (candidates, *value)."""
        return self.quantize(self.value[images].unsqueeze(0), parameters.reshape(len(parameters), *self.shape))

    def current(self, images: slice = slice(None)) -> Tensor:
        """The operand as chosen so far, shape (1, *value)."""
        if self.candidates is None:
            return self.value[images].unsqueeze(0)
        return self.apply(self.chosen.unsqueeze(0), images)


class SiteSearch:
    """Alternating search of the two operands of a site.

    Attributes:
        operands: (weight, input) of a Linear or convolution, (A, B) of a matmul.
        scorer: The metric.
    """

    def __init__(self, site: SiteSamples, operands: tuple[Operand, Operand], metric: str, memory_mib: int) -> None:
        for value in (*(o.value for o in operands), site.output):
            if not bool(torch.isfinite(value).all()):
                raise QuantizationError(f"{site.name}: the weight, an input or the output holds NaN or Inf")
        self.site = site
        self.operands = operands
        groups = max(o.choice.numel() for o in operands)
        self.scorer = Scorer(site, metric, groups, memory_mib)

    def run(self, rounds: int) -> dict[str, Any]:
        """Search; the choices are left in the operands.

        Args:
            rounds: Most turns through the operands; the search ends before, once a turn changes nothing.

        Returns:
            Notes: metric, score at min-max and at the choice, rounds used.

        Raises:
            QuantizationError: Every score is zero though the outputs differ.
        """
        start = float(self.score())
        used, seen = 0, [torch.empty(0)] * 2  # what the other operand was when this one was scored last
        for used in range(1, rounds + 1):  # noqa: B007
            before = [o.choice.clone() for o in self.operands]
            for index, operand in enumerate(self.operands):
                other = self.operands[1 - index].choice
                if operand.candidates is None or torch.equal(seen[index].to(other), other):
                    continue
                seen[index] = other
                scores = self.scores(index)
                self._refuse_zero(scores, index)
                if operand.choice.numel() == 1:
                    scores = scores.mean(1, keepdim=True)
                operand.choice = scores.nan_to_num(nan=-torch.inf).argmax(0)
            if all(torch.equal(a, o.choice) for a, o in zip(before, self.operands, strict=True)):
                break
        end = float(self.score())
        if not end >= start:  # only by rounding: the quadratic form and the direct score differ in the last digits
            for operand in self.operands:
                operand.choice = torch.zeros_like(operand.choice)
            end = start
        return {"metric": self.scorer.metric, "score_minmax": start, "score": end, "rounds": used}

    def score(self) -> Tensor:
        """Score of the site at the current choice, a scalar."""
        return self._direct(0, None).mean()

    def scores(self, index: int) -> Tensor:
        """Scores of all candidates of one operand, the other as chosen: shape (candidates, parts)."""
        candidates = self.operands[index].candidates
        assert candidates is not None
        if self.site.kind == "linear" and index == 0 and self.scorer.metric == "mse":
            return self._quadratic(candidates)
        return self._direct(index, candidates)

    def _direct(self, index: int, candidates: Tensor | None) -> Tensor:
        """Score by the outputs themselves; without candidates, of the current choice."""
        operand, other = self.operands[index], self.operands[1 - index]
        weight = self.site.kind != "matmul" and index == 0

        def produce(chosen: slice, images: slice) -> Tensor:
            mine = slice(None) if weight else images
            varied = operand.current(mine) if candidates is None else operand.apply(candidates[chosen], mine)
            fixed = other.current(slice(None) if self.site.kind != "matmul" and index == 1 else images)
            pair = (varied, fixed) if index == 0 else (fixed, varied)
            return self.product(*pair)

        count = 1 if candidates is None else len(candidates)
        inputs = [o.value for o in (self.operands if self.site.kind == "matmul" else self.operands[1:])]
        size = sum(2 * v[0].numel() for v in inputs)
        return self.scorer.score(produce, count, size, 2 * operand.value.numel() if weight else 0)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Output of the site for operands of shape (candidates or 1, …)."""
        if self.site.kind == "matmul":
            return left @ right
        if self.site.kind == "conv":
            assert self.site.weight is not None
            shape = self.site.weight.shape
            count = max(len(left), len(right))
            pairs = zip(left.expand(count, *left.shape[1:]), right.expand(count, *right.shape[1:]), strict=True)
            return torch.stack([self.site.forward(w.reshape(shape), (x,)) for w, x in pairs])
        bias = self.site.bias
        if len(left) == 1:
            return F.linear(right, left[0], bias)
        # All candidates' rows in one product.
        rows = right[0] @ left.flatten(0, 1).T
        rows = rows.reshape(*rows.shape[:-1], len(left), -1).movedim(-2, 0)
        return rows + bias if bias is not None else rows.contiguous()

    def _quadratic(self, candidates: Tensor) -> Tensor:
        """Exact squared error of weight candidates from second moments, without any output.

        With D = y − (W x̂ + b) the error is r = D + (W − Ŵ) x̂, and Σ r² = Σ D² + 2 ⟨W − Ŵ, Σ D x̂ᵀ⟩ +
        tr (W − Ŵ) H (W − Ŵ)ᵀ, H = Σ x̂ x̂ᵀ.
        """
        weight, inputs = self.operands
        features = weight.value.shape[1]
        moment = weight.value.new_zeros(features, features)
        cross = torch.zeros_like(weight.value)
        constant = weight.value.new_zeros(self.scorer.parts, dtype=torch.float64)
        output = self.site.output
        image = output.element_size() * (COPIES * output[0].numel() + 2 * inputs.value[0].numel())
        step = max(1, self.scorer.budget // image)
        for first in range(0, len(output), step):
            batch = slice(first, first + step)
            x = inputs.current(batch)
            rest = output[batch] - self.product(weight.value.unsqueeze(0), x)[0]
            constant += self.scorer.by_part(rest.square().unsqueeze(0))[0]
            rest, flat = rest.reshape(-1, rest.shape[-1]), x.reshape(-1, features)
            moment += flat.T @ flat
            cross += rest.T @ flat
        out = []
        step = max(1, self.scorer.budget // (weight.value.element_size() * COPIES * weight.value.numel()))
        for part in candidates.split(step):
            change = weight.value - weight.apply(part)
            terms = ((change @ moment) + 2 * cross).mul_(change)  # the elements of a row add up to its error
            out.append(terms.reshape(len(part), self.scorer.parts, -1).sum(2).double() + constant)
        return self.scorer.finish(torch.cat(out).clamp_(min=0), torch.zeros(()))

    def _refuse_zero(self, scores: Tensor, index: int) -> None:
        """A gradient so small that its square is zero gives no order to the candidates."""
        if self.scorer.gradient is None or bool(scores.any()):
            return
        plain = SiteSearch(self.site, self.operands, "mse", self.scorer.budget // 2**20)
        if bool(plain.scores(index).any()):
            raise QuantizationError(
                f"{self.site.name}: the {self.scorer.metric} score is zero for every candidate though their outputs "
                "differ; choose metric=mse or cosine"
            )
