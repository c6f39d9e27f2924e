"""Triton's interpreter without what it does over and over.

It makes Triton's language run on numpy by setting some hundred attributes of its modules: when a kernel is
launched, and in Triton 3.9 again whenever a kernel calls another function, for which nothing is left to set.
That takes a quarter of the time of our kernels. Here a function is prepared at its first call in a launch.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any


@cache
def quicken() -> None:
    """From now on, however often it is called. Nothing happens where Triton is not installed, or has another
    interpreter.
    """
    if not find_spec("triton"):
        return
    from triton.runtime import interpreter

    names = "_patch_lang", "InterpretedFunction", "InterpreterError"
    if not all(hasattr(interpreter, name) for name in names):
        return
    prepare, function = interpreter._patch_lang, interpreter.InterpretedFunction
    prepared: set[Any] = set()

    def launched(fn: Any) -> Any:
        prepared.clear()
        return prepare(fn)

    def called(self: Any, *args: Any, **more: Any) -> Any:
        if self.fn not in prepared:
            prepared.add(self.fn)
            prepare(self.fn)
        try:
            return self.rewrite()(*args, **more)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = launched
    function.__call__ = called
