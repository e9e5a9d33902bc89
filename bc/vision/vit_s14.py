"""The embedded ViT-S/14 backbone: from its ONNX file to timm's ``vit_small_patch14_dinov2`` at 56 × 56 pixels.

The exporter kept the names of biases, norms and layer scales, but not those of the matrices: each is found as the
constant factor of the product to which its bias is added. The position embedding is resampled from 37 × 37 to 4 × 4
as the file's own graph does it: bicubic, without antialias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bc.errors import UserError

BLOCKS = 12
GRID = 4
#: timm's name of a block's Linear → the name in the file.
LINEARS = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
ATTENTION = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def convert(path: Path) -> dict[str, Tensor]:
    """The file's weights under timm's names, float32, without a head.

    Args:
        path: The ONNX file.

    Raises:
        UserError: The package ``onnx`` is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "model: vit_s14_fashion is published as an ONNX file, and the package onnx, which reads it, is not "
            "installed; run `pip install onnx`"
        ) from error
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    matrices = _matrices(graph.node, values)
    stem = "backbone.embeddings."
    state = {
        "cls_token": values[f"{stem}cls_token"],
        "pos_embed": _position_embedding(values, f"{stem}cls_token"),
        "patch_embed.proj.weight": values[f"{stem}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[f"{stem}patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for i in range(BLOCKS):
        ours, theirs = f"blocks.{i}.", f"backbone.encoder.layer.{i}."
        state |= {ours + name: values[theirs + source] for name, source in VECTORS.items()}
        state[f"{ours}attn.qkv.weight"] = torch.cat([matrices[f"{theirs}{part}.bias"] for part in ATTENTION])
        state[f"{ours}attn.qkv.bias"] = torch.cat([values[f"{theirs}{part}.bias"] for part in ATTENTION])
        for name, source in LINEARS.items():
            state[f"{ours}{name}.weight"] = matrices[f"{theirs}{source}.bias"]
            state[f"{ours}{name}.bias"] = values[f"{theirs}{source}.bias"]
    return {name: value.float().contiguous() for name, value in state.items()}


def _matrices(nodes: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name of a bias → the matrix that it goes with, (out, in)."""
    factors = {n.output[0]: n.input[1] for n in nodes if n.op_type == "MatMul" and n.input[1] in values}
    found = {}
    for node in nodes:
        if node.op_type == "Add":
            biases = [name for name in node.input if name in values]
            products = [name for name in node.input if name in factors]
            if len(biases) == len(products) == 1:
                found[biases[0]] = values[factors[products[0]]].T
    return found


def _position_embedding(values: dict[str, Tensor], class_token: str) -> Tensor:
    """The class token's position and those of the patches, the latter resampled."""
    three = {name: value for name, value in values.items() if value.dim() == 3 and name != class_token}
    (first,) = (value for value in three.values() if value.shape[1] == 1)
    (patches,) = (value for value in three.values() if value.shape[1] > 1)
    side = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (GRID, GRID), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
