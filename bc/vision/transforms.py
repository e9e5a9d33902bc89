"""timm's evaluation transform of a model, in two steps: a picture → its uint8 crop, the crop → the model's input.

The first step depends on sizes and interpolation alone, so that its result can be cached and shared by all models
with the same; the second is a cast, a scale and a shift on tensors. Together they equal timm's own transform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """Facts of a model's evaluation transform.

    Attributes:
        channels: 3, or 1 for grey.
        size: Height and width of the crop that the model is given.
        crop_pct: Size of the crop over the length of the short side after resizing.
        interpolation: ``bicubic``, ``bilinear``, …
        mean: Of each channel, for pixels in 0 … 1.
        std: Of each channel.
        crop_mode: timm's ``center``, ``squash`` or ``border``.
    """

    channels: int
    size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """As timm resolves it for a model that it created."""
        from timm.data import resolve_model_data_config

        config: dict[str, Any] = resolve_model_data_config(model)
        channels, height, width = config["input_size"]
        return cls(
            channels,
            (height, width),
            config["crop_pct"],
            config["interpolation"],
            tuple(config["mean"]),
            tuple(config["std"]),
            config["crop_mode"],
        )

    @property
    def resize(self) -> int:
        """Length of the short side after resizing."""
        return int(self.size[0] / self.crop_pct)

    @property
    def crop_name(self) -> str:
        """What two models have in common if they are given the same crops; part of a cache's name."""
        colours = "grey" if self.channels == 1 else "rgb"
        height, width = self.size
        return f"{colours}-{self.crop_mode}-{self.interpolation}-{self.crop_pct:g}-{height}x{width}"

    def cropper(self) -> Callable[[Image.Image], NDArray[np.uint8]]:
        """Picture → crop, uint8, shape (channels, height, width); any colour mode is converted."""
        from timm.data import create_transform

        mode = "L" if self.channels == 1 else "RGB"
        transform = create_transform(
            (self.channels, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )

        def crop(picture: Image.Image) -> NDArray[np.uint8]:
            return transform(picture.convert(mode)).numpy()

        return crop

    def normalize(self, crops: Tensor) -> Tensor:
        """Crops, uint8, (n, channels, height, width) → the model's input, float32."""
        shape = (1, -1, 1, 1)
        return crops.float().div(255).sub(torch.tensor(self.mean).view(shape)).div(torch.tensor(self.std).view(shape))
