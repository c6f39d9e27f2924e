"""Functions by their names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from refimpl.errors import refusal


def find(name: str) -> Callable[..., Any]:
    """The function called `package.module:function`; InputFormatError E8006."""
    module, colon, function = name.partition(":")
    if not colon:
        raise refusal("E8006 kernel", name, expected="package.module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise refusal(
            "E8006 imported", name, error=error, expected="package.module:function on Python's path"
        ) from error
    return found
