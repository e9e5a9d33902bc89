"""Telling one float model from another of the same name: a hash of its quantizable weights, from a sample of values."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from bc.chains import chain_of

SAMPLED = 64  # values of each weight, evenly spaced; of a fine-tuned copy nearly all differ


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and sampled values of the weights that a quantizer would replace.

    Args:
        model: A float model of a known family, language or vision.

    Returns:
        64 hexadecimal digits; equal for equal weights, whatever device they are on.
    """
    found = hashlib.sha256()
    for site in chain_of(model).sites:
        if site.weight is None:
            continue
        flat = site.weight.detach().reshape(-1)
        where = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
        found.update(f"{site.name} {tuple(site.weight.shape)} ".encode())
        found.update(flat[where.to(flat.device)].float().cpu().numpy().tobytes())
    return found.hexdigest()
