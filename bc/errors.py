"""Errors that a user can mend, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: the message names the field, the value, what is allowed and the mend.

    Command lines print the message alone, without a traceback, and exit with status 2.
    """


class QuantizationError(RuntimeError):
    """A quantizer could not produce a valid result for a site (named in the message)."""


def headless(model: object) -> UserError:
    """Build the error for a language model without logits."""
    return UserError(
        f"model: a {type(model).__name__} puts out no logits of tokens; load it as a causal language model, with "
        "bc.load or AutoModelForCausalLM"
    )


def pickled(field: str, path: object) -> UserError:
    """Build the error for a checkpoint that only the unrestricted, code-running reader of pickles could read.

    Args:
        field: Dotted name of the setting.
        path: The checkpoint, or the folder that holds it.

    Returns:
        A :class:`UserError` that says how to convert it.
    """
    convert = "import sys, torch; from safetensors.torch import save_file; "
    convert += "x = torch.load(sys.argv[1], weights_only=False); "
    convert += "x = x.state_dict() if hasattr(x, 'state_dict') else x.get('state_dict', x)"
    convert += "; save_file({k: v.clone() for k, v in x.items() if torch.is_tensor(v)}, 'model.safetensors')"
    return UserError(
        f"{field}: {str(path)!r} is a pickle of more than tensors, which can run any code when it is read; it is not "
        f'read. If you trust it, convert it: python -c "{convert}" FILE, and use model.safetensors in its place'
    )


def unknown(field: str, value: object, allowed: Iterable[object]) -> UserError:
    """Build the error for a value that is not one of a closed set.

    Args:
        field: Dotted name of the setting.
        value: What was given.
        allowed: The values that are accepted.

    Returns:
        A :class:`UserError` that lists the allowed values and the nearest one.
    """
    names = sorted(str(a) for a in allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"{field}: {value!r} is not known; allowed: {', '.join(names)}{hint}")
