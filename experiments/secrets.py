"""Keys and tokens stay out of results, logs and messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bc.errors import UserError

KINDS = "(?:TOKEN|SECRET|PASSWORD)"
VARIABLES = re.compile(rf"^(WANDB_API_KEY|.*_{KINDS})$")
ASSIGNED = re.compile(rf"\b(WANDB_API_KEY|\w*_{KINDS})=[\"']?(?![\"'$`\s]|$)")
SHORTEST = 8  # characters: anything shorter would strike out ordinary words
PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_…"),
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), "…"),  # user and password in an address
)


def redact(text: str) -> str:
    """A text without the values of the environment's secrets, hub tokens, and passwords in addresses."""
    for name, value in os.environ.items():
        if VARIABLES.match(name) and len(value) >= SHORTEST:
            text = text.replace(value, f"<{name}>")
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    return text


def refuse_secrets(arguments: Iterable[str]) -> None:
    """Refuse a command line that holds a secret: it would be written into logs, and other users see it.

    Raises:
        UserError: Naming the setting, not the value.
    """
    for argument in arguments:
        if redact(argument) != argument:
            key = argument.partition("=")[0]
            raise UserError(
                f"{redact(key)}: its value is a secret, which would end in the logs; leave it out: W&B and the hub "
                "read WANDB_API_KEY and HF_TOKEN from the environment"
            )


def refuse_secrets_within(settings: Mapping[str, Any], field: str) -> None:
    """Refuse settings that hold a secret or give one to a variable: Hydra writes them into its files.

    Args:
        settings: Plain values, with lists and mappings of them.
        field: What the settings are called.

    Raises:
        UserError: Naming the setting and the variable, not the value.
    """
    for key, value in settings.items():
        found = ASSIGNED.search(str(value))
        if found or redact(str(value)) != str(value):
            what = f"{found[1]}'s value" if found else "its value"
            raise UserError(
                f"{field}.{key}: {what} is a secret, which would end in Hydra's files and the logs; set it in the "
                "shell that submits, whose environment jobs inherit, or read it from a file: "
                'export HF_TOKEN="$(cat ~/.hf_token)"'
            )
