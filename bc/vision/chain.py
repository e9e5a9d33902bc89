"""Pieces that the families' chains are made of."""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import GELU, GELUTanh, GluMlp, Mlp, PatchEmbed, QuickGELU
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from bc.errors import UserError
from bc.sites import WHOLE, Region, alone
from bc.vision.attention import NamedAttention, NamedWindowAttention
from bc.vision.base import Site, Unit

PRE_NORM = (Block, SwinTransformerBlock)
ENDS_IN_LINEAR = (NamedAttention, NamedWindowAttention, Mlp, GluMlp, PatchMerging)
GELUS = (nn.GELU, GELU, GELUTanh, QuickGELU)  # none is below −0.171


class View(nn.Module):
    """A part of a model's forward as a module of its own.

    It shares the model's modules and parameters under their own names, so that hooks, devices and edits act on both;
    the model itself is referred to without being registered.
    """

    def __init__(self, model: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.__dict__["model"], self.__dict__["parts"] = model, parts
        for name in parts:
            value = getattr(model, name, None)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, nn.Module):
                self.add_module(name, value)
        self.training = model.training

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        """A view with modules of its own, of a shallow copy of the model that holds them."""
        own: Any = self.model
        model = copy.copy(own)
        for table in ("_modules", "_parameters"):
            model.__dict__[table] = dict(own.__dict__[table])
            for name in set(self.__dict__["parts"]) & set(model.__dict__[table]):
                model.__dict__[table][name] = copy.deepcopy(model.__dict__[table][name], memo)
        kind: Any = type(self)  # every subclass knows its parts
        made: View = kind(model)
        return made


class VitStem(View):
    """Images → tokens: patches, class token, position embedding, norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, ("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre"))

    def forward(self, images: Tensor) -> Tensor:
        """As the first lines of ``forward_features``."""
        model: Any = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


class Tail(View):
    """Hidden state → logits: norm, pooling, head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, ("norm", "fc_norm", "head", "head_dist"))

    def forward(self, hidden: Tensor) -> Tensor:
        """As the last lines of ``forward``."""
        model: Any = self.model
        return model.forward_head(model.norm(hidden))


def stem_sites(model: Any) -> tuple[Site, ...]:
    """The patch embedding.

    Raises:
        UserError: It is more than one convolution.
    """
    require("patch_embed", model.patch_embed, (PatchEmbed,))
    return (Site("patch_embed.proj", model.patch_embed.proj, "conv", "patch_embed"),)


def head_sites(model: nn.Module, names: tuple[str, ...]) -> tuple[Site, ...]:
    """The heads that are Linears."""
    found = [(name, model.get_submodule(name)) for name in names]
    return tuple(Site(name, module, "linear", "head") for name, module in found if isinstance(module, nn.Linear))


def block_unit(name: str, block: Any, stage: int | None = None) -> Unit:
    """A transformer block: attention and MLP, each behind its own norm, or before it in a ``ResPostBlock``.

    Raises:
        UserError: The block or its MLP is of a kind that is not covered, or its matmuls have no names.
    """
    require(name, block, (*PRE_NORM, ResPostBlock))
    attention, mlp = block.attn, block.mlp
    require(f"{name}.mlp", mlp, (Mlp, GluMlp))
    if not hasattr(attention, "matmul_qk"):
        raise UserError(f"model: the matmuls of {name} have no names; call bc.vision.wrap(model) first")
    heads = attention.num_heads
    norm1, norm2 = map(layer_norm, (block.norm1, block.norm2) if isinstance(block, PRE_NORM) else (None, None))
    sites = (
        Site(f"{name}.attn.qkv", attention.qkv, "linear", "qkv", heads, norm1),
        Site(f"{name}.attn.matmul_qk", attention.matmul_qk, "matmul", "matmul_qk", heads),
        Site(f"{name}.attn.matmul_av", attention.matmul_av, "matmul", "matmul_av", heads),
        Site(f"{name}.attn.proj", attention.proj, "linear", "proj"),
        Site(f"{name}.mlp.fc1", mlp.fc1, "linear", "fc1", norm=norm2),
        Site(f"{name}.mlp.fc2", mlp.fc2, "linear", "fc2" if behind_gelu(mlp) else "mlp_out"),
    )
    regions = {
        "attention": Region("attn", exit_of("attn", attention, "proj", "proj_drop")),
        "mlp": Region("mlp", exit_of("mlp", mlp, "fc2", "drop2")),
        "block": WHOLE,
    }
    return Unit(name, block, "block", alone(sites), regions=regions, stage=stage)


def exit_of(path: str, module: nn.Module, last: str, drop: str = "") -> str:
    """Path of what returns a module's output: of its last Linear, whose own bias a bias folds into, if that is it.

    Args:
        path: Of the module, in its unit.
        module: Of a class whose forward is known, or it is its own exit.
        last: Name of the last Linear.
        drop: Name of the dropout behind it, which has to do nothing.
    """
    behind = getattr(module, drop, None)
    silent = behind is None or isinstance(behind, nn.Identity) or getattr(behind, "p", None) == 0
    if type(module) not in ENDS_IN_LINEAR or not silent or not isinstance(getattr(module, last), nn.Linear):
        return path
    return f"{path}.{last}".lstrip(".")


def behind_gelu(mlp: Any) -> bool:
    """Whether fc2 reads a GELU's output or an approximation's: not a gate's, another activation's or a norm's."""
    return isinstance(mlp, Mlp) and isinstance(mlp.act, GELUS) and isinstance(mlp.norm, nn.Identity)


def require(name: str, module: object, covered: tuple[type, ...]) -> None:
    """Refuse a part of a model that is not of a covered class."""
    if not isinstance(module, covered):
        names = ", ".join(kind.__name__ for kind in covered)
        raise UserError(
            f"model: {name} is a {type(module).__name__}, which is not covered; covered here are timm's {names}; "
            "choose another model"
        )


def layer_norm(module: nn.Module | None) -> nn.LayerNorm | None:
    """The module, if it is a LayerNorm with weight and bias."""
    return module if isinstance(module, nn.LayerNorm) and module.weight is not None else None
