"""Generate text from a checkpoint: ``python -m experiments.generate checkpoint=FOLDER prompt="Once upon a time"``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bc import device as devices
from bc.errors import UserError
from experiments.arguments import command
from experiments.checkpoints import open_checkpoint
from experiments.config import LARGEST_SEED


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of the command.

    Attributes:
        checkpoint: Folder that ``bc.save`` or ``save_model=true`` wrote, with a tokenizer.
        prompt: What the model is to go on from.
        tokens: Most new tokens.
        temperature: 0 takes the most probable token; above 0 samples.
        seed: Of the sampling.
        device: auto, cpu, cuda or cuda:N.
    """

    checkpoint: str
    prompt: str
    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"tokens: {self.tokens} is not allowed; use 1 or more")
        if not 0 <= self.temperature < math.inf:  # nor what is not a number
            raise UserError(f"temperature: {self.temperature} is not allowed; use a number of 0 or more")
        if not 0 <= self.seed <= LARGEST_SEED["text"]:
            raise UserError(f"seed: {self.seed} is not allowed; use 0 or more, to {LARGEST_SEED['text']}")
        if not self.prompt:
            raise UserError("prompt: is empty; give some text")


def check_length(model: Any, prompt: int, tokens: int) -> None:
    """Refuse a text that is longer than a model's table of positions; rotary ones have none.

    Raises:
        UserError: Saying how many tokens are left.
    """
    tables = [name for name, part in model.named_modules() if isinstance(part, nn.Embedding) and "position" in name]
    longest = getattr(model.config, "max_position_embeddings", None)
    if not tables or longest is None or prompt + tokens <= longest:
        return
    if prompt >= longest:
        raise UserError(
            f"prompt: its {prompt} tokens leave none of the model's {longest} positions; give a shorter one"
        )
    raise UserError(
        f"tokens: {tokens} after the prompt's {prompt} are more than the model's {longest} positions; "
        f"set tokens={longest - prompt} or less, or give a shorter prompt"
    )


@torch.no_grad()
def generate(config: GenerateConfig) -> str:
    """The prompt and what the model made of it.

    Raises:
        UserError: The folder holds no checkpoint or no tokenizer, or the tokenizer is damaged. Or the prompt gives no
            tokens, or the text would exceed the model's positions.
        DamagedFileError: The checkpoint is damaged.
    """
    device = devices.resolve(config.device)
    model: Any
    model, tokenizer = open_checkpoint(config.checkpoint)
    if tokenizer is None:
        raise UserError(
            f"checkpoint: no tokenizer in {config.checkpoint!r}; save it with bc.save(model, folder, tokenizer)"
        )
    model.to(device)
    inputs = tokenizer(config.prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].numel():
        raise UserError(f"prompt: {config.prompt!r} gives this tokenizer no tokens; give another text")
    check_length(model, inputs["input_ids"].shape[1], config.tokens)
    torch.manual_seed(config.seed)
    how: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        how = {"do_sample": True, "temperature": config.temperature}
    ids = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=config.tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **how,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a mistake in the input."""
    return command("generate", GenerateConfig, generate, arguments)


if __name__ == "__main__":
    sys.exit(main())
