"""Functions by their names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refimpl.errors import near, refusal


def find(name: str) -> Callable[..., Any]:
    """The function called `package.module:function`; InputFormatError E8006."""
    module, colon, function = name.partition(":")
    if not colon:
        raise refusal("E8006 kernel", name, expected="package.module:function")
    close = _module_meant(module, function)
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            close = near(part, dir(found))
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        hint = f"did you mean {close[0]}?" if close else ""
        raise refusal(
            "E8006 imported",
            name,
            error=error,
            expected="package.module:function on Python's path",
            hint=hint,
        ) from error
    return found


def _module_meant(module: str, function: str) -> list[str]:
    """A name for one that has the ending of a file, or whose module in the current folder is misspelled."""
    stem = module.removesuffix(".py").replace(os.sep, ".")
    if stem != module:
        return [f"{stem}:{function}"]
    here = [file.stem for file in Path().glob("*.py")]
    return [f"{name}:{function}" for name in near(module, here) if module not in here]
