"""timm's attention with its two matmuls as named modules, so that they can be quantized and compensated.

timm computes attention in one fused call, or with the operator ``@``: neither can be hooked. Here the class of an
attention module is exchanged for a subclass whose forward runs through ``matmul_qk`` and ``matmul_av``; the module
keeps its parameters, buffers, names and state dict. The forward is timm's unfused one: q is scaled before the matmul,
relative-position bias and shifted-window mask are added after it.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from bc.errors import UserError


class MatMul(nn.Module):
    """The product of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The batched product a @ b."""
        return a @ b


class NamedAttention(Attention):
    """Attention of ViT and DeiT."""

    matmul_qk: MatMul
    matmul_av: MatMul

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend; masks belong to language models and are refused."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("attention masks are not supported in a ViT")
        images, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        scores = self.matmul_qk(q * self.scale, k.transpose(-2, -1))
        weights = self.attn_drop(scores.softmax(dim=-1))
        x = self.matmul_av(weights, v).transpose(1, 2).reshape(images, tokens, -1)
        return self.proj_drop(self.proj(self.norm(x)))


class NamedWindowAttention(WindowAttention):
    """Attention of Swin: the batch axis is images × windows."""

    matmul_qk: MatMul
    matmul_av: MatMul

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: Shape (images · windows, tokens, channels).
            mask: Shape (windows, tokens, tokens), added to the scores, for shifted windows.
        """
        count, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.matmul_qk(q * self.scale, k.transpose(-2, -1)) + self._get_rel_pos_bias()
        if mask is not None:
            windows = scores.view(-1, len(mask), self.num_heads, tokens, tokens)
            scores = (windows + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.num_heads, tokens, tokens)
        weights = self.attn_drop(self.softmax(scores))
        x = self.matmul_av(weights, v).transpose(1, 2).reshape(count, tokens, -1)
        return self.proj_drop(self.proj(x))


NAMED: dict[type[nn.Module], type[nn.Module]] = {Attention: NamedAttention, WindowAttention: NamedWindowAttention}


def name_matmuls(model: nn.Module) -> nn.Module:
    """Give every attention of a model named matmuls, in place.

    Raises:
        UserError: The model has an attention of a kind that is not covered.
    """
    for name, module in list(model.named_modules()):
        named = NAMED.get(type(module))
        if named is not None:
            if getattr(module, "gate", None) is not None:
                raise UserError(f"model: {name} is a gated attention, which is not covered; choose another model")
            _swap(module, named)
        elif "Attention" in type(module).__name__ and type(module) not in NAMED.values():
            raise UserError(
                f"model: {name} is a {type(module).__name__}, which is not covered; covered are timm's "
                f"{', '.join(kind.__name__ for kind in NAMED)}"
            )
    return model


def _swap(module: Any, named: type[nn.Module]) -> None:
    module.__class__ = named
    module.fused_attn = False
    module.matmul_qk, module.matmul_av = MatMul(), MatMul()
    module.matmul_qk.training = module.matmul_av.training = module.training
