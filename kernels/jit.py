"""How kernels are compiled: by Numba when first called, without the interpreter lock, and kept in the user's
cache folder for the next process (see `kept`), or compiled anew in each where that cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.kernels import kept
from refimpl.kernels.kept import folder


def jit(function=None, *, parallel: bool = False, reassociate: bool = False):
    """Numba's `njit` with this project's settings, as a decorator with or without arguments. `reassociate`
    lets sums be taken in any fixed order.
    """
    if function is None:
        return lambda f: jit(f, parallel=parallel, reassociate=reassociate)
    # Leave to change the order of sums and to fuse multiplications with additions, which makes vectors of a
    # loop; not to take NaN and infinity for absent, as fastmath=True would.
    fast = {"reassoc", "contract"} if reassociate else False
    # error_model "numpy": a division by zero gives infinity or NaN and no exception, so loops have no exits.
    found = numba.njit(function, nogil=True, parallel=parallel, error_model="numpy", fastmath=fast)
    if _keeps():
        kept.keep(found, function)
    return found


def _keeps() -> bool:
    """Whether what is compiled next is kept."""
    return folder() is not None


def variant(function: Callable, name: str, **constants: object) -> Callable:
    """`function` with some of its module's names given other values, constants for the compiler.

    Each variant has a name, and so files in the cache, of its own. A function that closes over the values
    would do the same, but Numba keeps all such functions in one index, in which two processes that compile at
    once take each other's code for their own; nor would it find one that closes over a compiled function
    again in the next process.
    """
    # Same code, other globals: Numba takes globals for constants.
    found = FunctionType(
        function.__code__, {**function.__globals__, **constants}, f"{function.__name__}_{name}"
    )
    found.__module__, found.__qualname__ = function.__module__, found.__name__
    return found


def callback(function: Callable, *, answers: bool = False):
    """`function` of integers, compiled now, to be called by its `address` (see `call`, and `atomic.ask` for
    one that `answers` with an integer).

    Numba compiles what a function calls together with it, each time anew and for each type of an argument.
    What is called by address is compiled once, by itself, and whoever calls it serves all formats.
    """
    # One signature for all: addresses and numbers are int64, so that `call` needs to know the count alone.
    arguments = [types.int64] * function.__code__.co_argcount
    result = types.int64 if answers else types.void
    return kept.callback(result(*arguments), function, kept=_keeps())


@intrinsic
def call(typingctx, address, arguments):
    """call(address, (int64, ...)) inside a Numba function: the `callback` there."""

    def codegen(context, b, signature, args):
        address, arguments = args
        count = signature.args[1].count
        # By the C convention and without Numba's status: nothing is raised through it.
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
words, signed_bytes = _pointer(types.int32), _pointer(types.int8)


@intrinsic
def memory(typingctx, address):
    """What lies at an address, for `numba.carray`."""
    return types.voidptr(types.int64), lambda context, b, signature, args: b.inttoptr(
        args[0], context.get_value_type(types.voidptr)
    )
