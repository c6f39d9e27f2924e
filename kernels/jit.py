"""How kernels are compiled: by Numba when first called, without the interpreter lock, and kept in the user's
cache folder for the next process.

The folder is named by what the machine code depends on and Numba does not look at (the other kernel files,
the level of SIMD), and is private: what lies in it is run. Where none can be made, or it is somebody else's,
kernels are compiled anew in each process.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.errors import RefimplError
from refimpl.files import cache_folder
from refimpl.kernels.simd_llvm import choose


@cache
def folder() -> Path | None:
    """The folder of compiled kernels for these sources, made if need be, with a word to the user that
    compiling takes a moment; None for no cache.
    """
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {choose()}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    try:
        found = cache_folder() / f"numba-{digest.hexdigest()[:16]}"
        first = not found.exists()
        found.mkdir(mode=0o700, exist_ok=True)
        owner = found.stat()
    except (RefimplError, OSError) as error:
        print(f"refimpl: note: compiled kernels are not kept: {error}", file=sys.stderr)
        return None
    if hasattr(os, "getuid") and (
        owner.st_uid != os.getuid() or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        print(f"refimpl: note: compiled kernels are not kept: others can write to {found}", file=sys.stderr)
        return None
    if first:
        print(
            f"refimpl: compiling the kernels for this CPU ({choose()}), once; kept in {found}",
            file=sys.stderr,
        )
    return found


def jit(function=None, *, parallel: bool = False, reassociate: bool = False):
    """Numba's `njit` with this project's settings, as a decorator with or without arguments. `reassociate`
    lets sums be taken in any fixed order.
    """
    if function is None:
        return lambda f: jit(f, parallel=parallel, reassociate=reassociate)
    fast = {"reassoc", "contract"} if reassociate else False
    return numba.njit(
        function, nogil=True, parallel=parallel, cache=_keeps(), error_model="numpy", fastmath=fast
    )


def _keeps() -> bool:
    """Whether what is compiled next is kept, and Numba told where."""
    place = folder()
    if place is not None:
        numba.config.CACHE_DIR = str(place)
    return place is not None


def variant(function: Callable, name: str, **constants: object) -> Callable:
    """`function` with some of its module's names given other values, constants for the compiler.

    Each variant has a name, and so files in the cache, of its own. A function that closes over the values
    would do the same, but Numba keeps all such functions in one index, in which two processes that compile at
    once take each other's code for their own; nor would it find one that closes over a compiled function
    again in the next process.
    """
    found = FunctionType(
        function.__code__, {**function.__globals__, **constants}, f"{function.__name__}_{name}"
    )
    found.__module__, found.__qualname__ = function.__module__, found.__name__
    return found


def callback(function: Callable):
    """`function` of integers, compiled now, to be called by its `address` (see `call`).

    Numba compiles what a function calls together with it, each time anew and for each type of an argument.
    What is called by address is compiled once, by itself, and whoever calls it serves all formats.
    """
    arguments = [types.int64] * function.__code__.co_argcount
    return numba.cfunc(types.void(*arguments), cache=_keeps(), error_model="numpy")(function)


@intrinsic
def call(typingctx, address, arguments):
    """call(address, (int64, ...)) inside a Numba function: the `callback` there."""

    def codegen(context, b, signature, args):
        address, arguments = args
        count = signature.args[1].count
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * count)
        b.call(b.inttoptr(address, kind.as_pointer()), [b.extract_value(arguments, i) for i in range(count)])
        return context.get_dummy_value()

    return types.none(types.int64, types.UniTuple(types.int64, arguments.count)), codegen


def _pointer(element: types.Type):
    """An intrinsic: what lies at an address, as an array without bounds."""

    @intrinsic
    def at(typingctx, address):
        kind = types.CPointer(element)
        return kind(types.int64), lambda context, b, signature, args: b.inttoptr(
            args[0], context.get_value_type(kind)
        )

    return at


floats, integers = _pointer(types.float32), _pointer(types.int64)
