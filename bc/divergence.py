"""How far a classifier's predictions are from the float model's, which takes images and no labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from bc.calibration import on_device
from bc.diagnosis import not_finite
from bc.errors import UserError
from bc.evaluation import evaluating
from bc.pipeline import Engine


class Divergence:
    """Mean Kullback–Leibler divergence KL(float ‖ other) of the class probabilities, in nats, over images.

    A few images tell settings of Bias Compensation apart by it that top-1, which counts only predictions that change,
    does not.

    Args:
        model: The float model on the CPU.
        images: Floating, shape (images, channels, height, width).
        engine: Device and batch size.

    Raises:
        UserError: There are no images.
        FloatingPointError: A logit is NaN; by the name of the module where that begins.
    """

    def __init__(self, model: nn.Module, images: Tensor, engine: Engine | None = None) -> None:
        if not len(images):
            raise UserError("held_out: there are no images to compare predictions on; give at least one")
        self.images, self.engine = images, engine or Engine()
        self.goal = self._log_probabilities(model)

    def __call__(self, model: nn.Module) -> float:
        """The divergence of another model, ≥ 0."""
        return kl_div(self._log_probabilities(model), self.goal, log_target=True, reduction="batchmean").item()

    @torch.no_grad()
    def _log_probabilities(self, model: nn.Module) -> Tensor:
        """Logarithms of the class probabilities, fp32 on the CPU, shape (images, classes)."""
        device, found = self.engine.device, []
        dtype = next(model.parameters()).dtype
        with evaluating(model), on_device(device, model):
            for part in self.images.split(self.engine.batch_size):
                part = part.to(device, dtype)
                scores = model(part).float()
                if bool(scores.isnan().any()):
                    raise not_finite(model, [partial(model, part)])
                found.append(scores.log_softmax(1).cpu())
        return torch.cat(found)
