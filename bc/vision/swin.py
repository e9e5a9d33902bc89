"""Swin: four stages of shifted windows; all but the first begin with a downsample."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bc.sites import Region, alone
from bc.vision.base import Site, Source, Unit, VisionFamily
from bc.vision.chain import Tail, View, block_unit, exit_of, head_sites, layer_norm, stem_sites
from bc.vision.vit import GREY, TINY


class _Stem(View):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, ("patch_embed",))

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return model.patch_embed(images)


def chain(model: Any) -> list[Unit]:
    """Stem, then of each stage its downsample and its blocks, tail."""
    units = [Unit("stem", _Stem(model), "stem", alone(stem_sites(model)))]
    for i, stage in enumerate(model.layers):
        down, name = stage.downsample, f"layers.{i}.downsample"
        if not isinstance(down, nn.Identity):
            site = Site(f"{name}.reduction", down.reduction, "linear", "reduction", norm=layer_norm(down.norm))
            regions = {"downsample": Region("", exit_of("", down, "reduction"))}
            units.append(Unit(name, down, "downsample", ((site,),), regions=regions, stage=i))
        units += [block_unit(f"layers.{i}.blocks.{j}", block, i) for j, block in enumerate(stage.blocks)]
    return [*units, Unit("tail", Tail(model), "tail", alone(head_sites(model, ("head.fc",))))]


FAMILY = VisionFamily(
    name="swin",
    classes=("SwinTransformer",),
    chain=chain,
    catalogue={
        "swin_t": Source("swin_tiny_patch4_window7_224.ms_in1k", "Swin-T", 81.39),
        "swin_s": Source("swin_small_patch4_window7_224.ms_in1k", "Swin-S", 83.23),
        "swin_b": Source("swin_base_patch4_window7_224.ms_in22k_ft_in1k", "Swin-B", 85.27),
        "swin_b_384": Source("swin_base_patch4_window12_384.ms_in22k_ft_in1k", "Swin-B*", 86.44),
        "tiny_swin": Source(
            "swin_tiny_patch4_window7_224",
            embedded="tiny_swin",
            options={
                "img_size": 32,
                "patch_size": 2,
                "embed_dim": 48,
                "depths": (2, 2, 2),
                "num_heads": (3, 6, 12),
                "window_size": 4,
                "drop_path_rate": 0.0,
                **TINY,
            },
            # 32 / 1.14 is 28 and a bit: the image keeps its size and gets a black margin of 2 pixels
            preprocessing={"input_size": (1, 32, 32), "num_classes": 10, "crop_pct": 1.14, **GREY},
        ),
    },
)
