"""What threads say to each other by, for Numba functions: words of memory that are read and changed in one
piece, the CPU's hint that it waits, and calls to functions of the system by their address.

A word is an int64 at an address. All of it is in one order for all threads (LLVM's `seq_cst`): what a thread
wrote before it changed a word, another sees that has read the change.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Intrinsics, because Numba has no atomics on memory of the host. `add` is the one instruction that this loop
# would have to be, with nobody else in between:
#
#     def add(words, i, value):
#         before = words[i]
#         words[i] = before + value
#         return before
I32, I64 = ir.IntType(32), ir.IntType(64)
# x86's `pause`, Arm's `yield`: a thread that spins leaves its core's other thread the units, and saves power
HINTS = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "AMD64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),
    "arm64": ("llvm.aarch64.hint", (1,)),
}


def _at(b: ir.IRBuilder, address: ir.Value, word: ir.Type = I64) -> ir.Value:
    return b.inttoptr(address, word.as_pointer())


@intrinsic
def load(typingctx, address):
    """The word at an address."""
    return types.int64(types.int64), lambda context, b, signature, args: b.load_atomic(
        _at(b, args[0]), "seq_cst", 8
    )


@intrinsic
def load_half(typingctx, address):
    """The 32 bits at an address, the lower half of a word where bytes are in x86's order: what `futex` looks
    at.
    """
    return types.int64(types.int64), lambda context, b, signature, args: b.sext(
        b.load_atomic(_at(b, args[0], I32), "seq_cst", 4), I64
    )


@intrinsic
def store(typingctx, address, value):
    """Set the word at an address."""

    def codegen(context, b, signature, args):
        b.store_atomic(args[1], _at(b, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_half(typingctx, address, value):
    """Set the 32 bits at an address."""

    def codegen(context, b, signature, args):
        b.store_atomic(b.trunc(args[1], I32), _at(b, args[0], I32), "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add(typingctx, address, value):
    """Add to the word at an address; what it was before."""
    return types.int64(types.int64, types.int64), lambda context, b, signature, args: b.atomic_rmw(
        "add", _at(b, args[0]), args[1], "seq_cst"
    )


@intrinsic
def replace(typingctx, address, old, new):
    """Set the word at an address if it is `old`; whether it was."""

    def codegen(context, b, signature, args):
        # LLVM returns { what was there, whether it was exchanged }.
        found = b.cmpxchg(_at(b, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return b.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the CPU that this thread waits for another's word."""

    def codegen(context, b, signature, args):
        if platform.machine() in HINTS:
            name, given = HINTS[platform.machine()]
            kind = ir.FunctionType(ir.VoidType(), [I32] * len(given))
            b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), [I32(v) for v in given])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cycles(typingctx):
    """The CPU's counter of cycles, for comparisons with itself; 0 where programs may not read it."""

    def codegen(context, b, signature, args):
        # Arm's counter of cycles is the system's alone unless it allows more: reading it may end the program.
        if platform.machine() not in ("x86_64", "AMD64"):
            return I64(0)
        kind, name = ir.FunctionType(I64, []), "llvm.readcyclecounter"
        return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), [])

    return types.int64(), codegen


@intrinsic
def ask(typingctx, address, arguments):
    """ask(address, (int64, ...)): what the function of integers at an address returns, a `callback` or one of
    the system's.
    """

    def codegen(context, b, signature, args):
        address, arguments = args
        count = signature.args[1].count
        # All are int64, by the C convention: `futex` and `sched_yield` are called so too.
        kind = ir.FunctionType(I64, [I64] * count)
        return b.call(
            b.inttoptr(address, kind.as_pointer()), [b.extract_value(arguments, i) for i in range(count)]
        )

    return types.int64(types.int64, types.UniTuple(types.int64, arguments.count)), codegen
