"""Vectors for Numba: what numpy says of arrays, said of a CPU's registers, as LLVM instructions inside an
@intrinsic. No operation of the model is here; `dot_llvm` and `panel_llvm` are written in this language.

Why intrinsics. Numba compiles loops, and LLVM turns those that add and multiply floats into vectors by
itself. It does not for the products of quantized weights: Numba widens every integer to 64 bits, so that the
CPU's products of bytes are never recognized, and nibbles, scales and minima lie in orders that only a
permutation brings together. The instruction everything is built around, `Emitter.dot_fours`, is in Numba:

    def dot_fours(total, u, s):  # i32 [n], u8 [4 n], i8 [4 n]: adds to total
        for i in range(len(total)):
            for j in range(4 * i, 4 * i + 4):
                total[i] += np.int32(u[j]) * np.int32(s[j])

and with scales, `Emitter.scaled_dot`, one for each sixteen bytes:

    def scaled_dot(total, u, s, first, second):  # i32 [8], u8 [32], i8 [32], i32, i32: adds to total
        for j in range(32):
            total[j // 4] += np.int32(u[j]) * np.int32(s[j]) * (first if j < 16 else second)

Tests run both on every level. docs/cpu-experts.md has what whole rows of such loops cost.

`Lanes` is a vector value with operators; `Emitter` makes, loads and combines them. All of it is LLVM's
portable vector language, which any target compiles (on a narrow one in several instructions), except the
three products of 8- and 16-bit integers, where a level has its own instructions:

    generic   multiplications and additions LLVM knows on every CPU, Arm included; halves are widened by
              integer arithmetic
    avx2      vpmaddubsw (u8 x i8, pairs added to i16) and vpmaddwd (i16 x i16, pairs added to i32)
    vnni      vpdpbusd (u8 x i8, fours added to i32) and vpdpwssd, 256 bits wide: AVX-VNNI, or AVX-512 VNNI
              with VL
    avx512    those two, 512 bits wide where that pays
    bf16      the same, and vdpbf16ps (bf16 x bf16, pairs added to float32) for many tokens (`pair_llvm`)
    amx       the same, and for many tokens tiles of 16 rows of 64 bytes (`tile_llvm`) or of 32 bfloat16
              (`pair_tile_llvm`)

    dot_fours   u8   | u0  u1  u2  u3 | u4  u5  u6  u7 | ...     vpdpbusd, one instruction
                i8   | s0  s1  s2  s3 | s4  s5  s6  s7 | ...
                i32  |  total0 += u0 s0 + ... + u3 s3  | ...

    madd        i16  | x0      x1     | x2      x3     | ...     vpmaddwd
                i16  | y0      y1     | y2      y3     | ...
                i32  |  x0 y0 + x1 y1 | ...

The best level the CPU has is taken; REFIMPL_SIMD=generic|avx2|vnni|avx512|bf16|amx forces one, and a level
the CPU lacks is refused.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Sequence

import llvmlite.binding as llvm
import numba
from llvmlite import ir

from refimpl.errors import refusal

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LEVELS = ("generic", "avx2", "vnni", "avx512", "bf16", "amx")
WORDS = {
    "generic": 8,
    "avx2": 8,
    "vnni": 8,
    "avx512": 16,
    "bf16": 16,
    "amx": 16,
}  # of 32 bits in the widest register that pays


def available() -> tuple[str, ...]:
    """The levels that this CPU has and Numba is allowed to compile for, worst first."""
    features = llvm.get_host_cpu_features()
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # Numba was told to compile for another CPU
        return LEVELS[:1]
    has_avx2 = all(features.get(f) for f in ("avx2", "fma", "f16c"))
    has_vnni = has_avx2 and (
        features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl"))
    )
    has_avx512 = has_vnni and all(
        features.get(f) for f in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
    )
    # The table that codes are looked up in takes VBMI; of CPUs with products of bfloat16, one has none.
    has_bf16 = has_avx512 and features.get("avx512bf16") and features.get("avx512vbmi")
    # Tiles of bytes and tiles of bfloat16 are two features, and kernels of the level use both.
    has_amx = has_bf16 and all(features.get(f) for f in ("amx-tile", "amx-int8", "amx-bf16"))
    has_amx = has_amx and _tiles_allowed()
    has = (has_avx2, has_vnni, has_avx512, has_bf16, has_amx)
    return LEVELS[: 1 + sum(map(bool, has))]


def _tiles_allowed() -> bool:
    """Ask Linux for this process's use of tiles, whose 8 kB each thread then saves when it gives its core
    away. A signal's own stack that is too small for them is a reason for refusal.
    """
    arch_prctl, request, tile_data = 158, 0x1023, 18
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def choose() -> str:
    """The level in use. UnsupportedError E5020 when REFIMPL_SIMD names another than `available` has."""
    levels = available()
    forced = os.environ.get("REFIMPL_SIMD")
    if forced and forced not in levels:
        raise refusal("E5020", "REFIMPL_SIMD", found=forced, expected=" or ".join(levels))
    return forced or levels[-1]


LEVEL = choose()  # of all kernels of this process


class Lanes:
    """A vector value of LLVM, all lanes of one type (i8 to i64, float32 or boolean).

    `&`, `|`, `^`, `<<`, `>>` (logical), `+`, `-`, `*` work lane by lane, with another vector of its type or
    with a number, and give a vector of the same type. Each writes one instruction at the builder's place.
    """

    def __init__(self, b: ir.IRBuilder, value: ir.Value):
        self.b, self.value = b, value

    def _with(self, value: ir.Value) -> Lanes:
        return Lanes(self.b, value)

    def _other(self, x: Lanes | int) -> ir.Value:
        return x.value if isinstance(x, Lanes) else ir.Constant(self.value.type, [x] * self.value.type.count)

    def __and__(self, x):
        return self._with(self.b.and_(self.value, self._other(x)))

    def __or__(self, x):
        return self._with(self.b.or_(self.value, self._other(x)))

    def __xor__(self, x):
        return self._with(self.b.xor(self.value, self._other(x)))

    def __lshift__(self, x):
        return self._with(self.b.shl(self.value, self._other(x)))

    def __rshift__(self, x):
        return self._with(self.b.lshr(self.value, self._other(x)))

    def __add__(self, x):
        return self._with((self.b.fadd if self._floats() else self.b.add)(self.value, self._other(x)))

    def __sub__(self, x):
        return self._with((self.b.fsub if self._floats() else self.b.sub)(self.value, self._other(x)))

    def __mul__(self, x):
        return self._with((self.b.fmul if self._floats() else self.b.mul)(self.value, self._other(x)))

    def negative(self) -> Lanes:
        """-x of float lanes, lane by lane."""
        return self._with(self.b.fneg(self.value))

    def _floats(self) -> bool:
        return self.value.type.element == F32

    def equals(self, x: Lanes | int) -> Lanes:
        """Booleans [n]: where integer lanes are equal to those of x, or to a number."""
        return self._with(self.b.icmp_unsigned("==", self.value, self._other(x)))

    def umax(self, x: Lanes) -> Lanes:
        """The greater of two unsigned integers, lane by lane, in lanes of this type."""
        return self._with(self.b.select(self.b.icmp_unsigned(">", self.value, x.value), self.value, x.value))

    def where(self, yes: Lanes, no: Lanes) -> Lanes:
        """Lanes of `yes` where this (booleans [n]) is true, lanes of `no` elsewhere."""
        return self._with(self.b.select(self.value, yes.value, no.value))

    def sar(self, n: int) -> Lanes:
        """Integers shifted to the right by n bits, the sign drawn in from the left."""
        return self._with(self.b.ashr(self.value, self._other(n)))

    def trunc(self, element: ir.Type) -> Lanes:
        """The low bits of integers, as integers of the narrower type `element`, lane by lane."""
        return self._with(self.b.trunc(self.value, ir.VectorType(element, self.value.type.count)))

    def zext(self, element: ir.Type) -> Lanes:
        """Unsigned integers as those of the wider type `element`, lane by lane."""
        return self._with(self.b.zext(self.value, ir.VectorType(element, self.value.type.count)))

    def sext(self, element: ir.Type) -> Lanes:
        """Signed integers as those of the wider type `element`, lane by lane."""
        return self._with(self.b.sext(self.value, ir.VectorType(element, self.value.type.count)))

    def floats(self) -> Lanes:
        """Signed integers as float32, rounded to nearest, lane by lane."""
        return self._with(self.b.sitofp(self.value, ir.VectorType(F32, self.value.type.count)))

    def bits(self, element: ir.Type, count: int) -> Lanes:
        """These bits read as `count` lanes of type `element`; no instruction."""
        return self._with(self.b.bitcast(self.value, ir.VectorType(element, count)))

    def take(self, indices: Sequence[int], other: Lanes | None = None) -> Lanes:
        """A vector of the lanes with these numbers, in their order; those of `other` count on from the end of
        this. One permutation where the CPU has it.
        """
        second = self.value if other is None else other.value
        return self._with(
            self.b.shuffle_vector(
                self.value, second, ir.Constant(ir.VectorType(I32, len(indices)), list(indices))
            )
        )


class Emitter:
    """Writes instructions at the place of an IR builder, for one level of LEVELS."""

    def __init__(self, b: ir.IRBuilder, level: str):
        self.b = b
        self.level = level
        self.vnni = level in ("vnni", "avx512", "bf16", "amx")

    # memory and constants

    def at(self, address: ir.Value, offset: ir.Value | int) -> ir.Value:
        """address + offset, i64, both in bytes."""
        return self.b.add(address, offset if isinstance(offset, ir.Value) else I64(offset))

    def load(self, address: ir.Value, element: ir.Type, count: int = 0) -> Lanes | ir.Value:
        """`count` lanes of type `element` from any address, or a scalar where count is 0."""
        kind = ir.VectorType(element, count) if count else element
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)
        return Lanes(self.b, value) if count else value

    def store(self, x: Lanes, address: ir.Value) -> None:
        """Write the lanes side by side to any address."""
        self.b.store(x.value, self.b.inttoptr(address, x.value.type.as_pointer()), align=1)

    def stack_memory(self, nbytes: int) -> ir.Value:
        """The address, i64, of `nbytes` bytes that are the function's own until it returns."""
        # In the entry block: an alloca inside a loop would take new memory at each turn.
        with self.b.goto_entry_block():
            return self._opaque(self.b.ptrtoint(self.b.alloca(ir.ArrayType(I8, nbytes)), I64), "r")

    def prefetch(self, address: ir.Value) -> None:
        """Ask for the 64 bytes around an address to be fetched to the second-level cache. Any address will
        do, also one where there is no memory.
        """
        pointer = ir.IntType(8).as_pointer()
        name = "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
        kind_of_access = [I32(0), I32(2), I32(1)]  # to be read, into the second level, data
        self.b.call(function, [self.b.inttoptr(address, pointer), *kind_of_access])

    def constant(self, element: ir.Type, values: Sequence[float]) -> Lanes:
        """A vector of type `element` with the given numbers in its lanes."""
        return Lanes(self.b, ir.Constant(ir.VectorType(element, len(values)), list(values)))

    def splat(self, scalar: ir.Value, count: int) -> Lanes:
        """A vector of `count` lanes with the scalar in each."""
        one = self.b.insert_element(
            ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined), scalar, I32(0)
        )
        return Lanes(self.b, one).take([0] * count)

    def loop(
        self, count: ir.Value, carried: Sequence[Lanes], body: Callable[[ir.Value, list[Lanes]], list[Lanes]]
    ) -> list[Lanes]:
        """carried = body(i, carried) for i = 0, 1, ..., count - 1 (i64); the last `carried` is returned."""
        # before ──> head ──> after
        #             ^ │
        #             │ v        `carried` are phis in head: the first values from before, then
        #            inside      what body returned
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(n) for n in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        phis = [b.phi(c.value.type) for c in carried]
        b.cbranch(b.icmp_signed("<", i, count), inside, after)
        b.position_at_end(inside)
        result = body(i, [Lanes(b, p) for p in phis])
        first = [I64(0), *(c.value for c in carried)]
        then = [b.add(i, I64(1)), *(r.value for r in result)]
        for phi, value, next_value in zip([i, *phis], first, then):
            phi.add_incoming(value, before)
            phi.add_incoming(next_value, b.block)  # body may have ended in a block of its own
        b.branch(head)
        b.position_at_end(after)
        return [Lanes(b, p) for p in phis]

    # arithmetic

    def fma(self, x: Lanes, y: Lanes, z: Lanes) -> Lanes:
        """x * y + z, f32 [n] each: rounded once where the level has an instruction for it, which is all but
        `generic`.
        """
        count = x.value.type.count
        name = "llvm.fma" if self.level != "generic" else "llvm.fmuladd"
        return self._call(f"{name}.v{count}f32", x.value.type, x, y, z)

    def total(self, x: Lanes) -> ir.Value:
        """The sum of float lanes, a scalar: halves are added until one lane is left, a fixed order."""
        # Eight lanes: 0+4 1+5 2+6 3+7, then the first two of these to the last two, then one to the other.
        while x.value.type.count > 1:
            half = x.value.type.count // 2
            x = x.take(range(half)) + x.take(range(half, 2 * half))
        return self.b.extract_element(x.value, I32(0))

    def any(self, x: Lanes) -> ir.Value:
        """Boolean: whether a bit is set in any integer lane."""
        whole = ir.IntType(x.value.type.count * x.value.type.element.width)
        return self.b.icmp_unsigned("!=", self.b.bitcast(x.value, whole), whole(0))

    def half(self, x: Lanes) -> Lanes:
        """Bit patterns of halves, i16 [n], as f32 [n], exactly; NaN and infinity stay what they are."""
        count = x.value.type.count
        if self.level != "generic":
            return Lanes(
                self.b,
                self.b.fpext(self.b.bitcast(x.value, ir.VectorType(F16, count)), ir.VectorType(F32, count)),
            )
        wide = x.zext(I32)
        # half      S EEEEE MMMMMMMMMM                      bias 15
        # float32   S EEEEEEEE MMMMMMMMMM0000000000000      bias 127: 2**112 is missing
        sign = (wide & 0x8000) << 16
        size = wide & 0x7FFF
        # The exponent is rebased by a multiplication, which gets subnormals right; that of infinity and NaN
        # has to be put in.
        number = (size << 13).bits(F32, count) * 2.0**112
        special = (size >> 10).equals(31).where((size << 13) | 0x7F800000, number.bits(I32, count))
        return (special | sign).bits(F32, count)

    def halves_at(self, address: ir.Value) -> Lanes:
        """The two halves at an address, as f32 [2]."""
        # By way of a general register: LLVM would load a half into a vector register whose old contents it
        # then has to wait for.
        pair = self._opaque(self.load(address, I32), "r")
        return self.half(Lanes(self.b, self.b.bitcast(pair, ir.VectorType(I16, 2))))

    def half_at(self, address: ir.Value) -> ir.Value:
        """The half at an address as a float32 scalar. Two more bytes behind it are read and not used."""
        return self.b.extract_element(self.halves_at(address).value, I32(0))

    def in_order(self, lanes: list[Lanes]) -> list[Lanes]:
        """These values, which LLVM will not compute before those passed earlier: that keeps it from mixing
        steps until the registers do not suffice.
        """
        return [Lanes(self.b, self._opaque(x.value, "x")) for x in lanes]

    def _opaque(self, value: ir.Value, register: str) -> ir.Value:
        """The value, passed through empty assembly so that LLVM does not know where it comes from.
        Register classes are x86's ("r" general, "x" vector), so only on its levels.
        """
        if self.level == "generic":
            return value
        kind = ir.FunctionType(value.type, [value.type])
        return self.b.call(ir.InlineAsm(kind, "", f"={register},0", side_effect=True), [value])

    # the products that levels do differently

    def madd(self, x: Lanes, y: Lanes) -> Lanes:
        """i16 [2 n] times i16 [2 n], neighbours added -> i32 [n]; n = 8 but for `generic`."""
        if self.level != "generic":
            return self._call("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), x, y)
        return _neighbours(x.sext(I32) * y.sext(I32))

    def scaled_dot(self, total: Lanes, u: Lanes, s: Lanes, spread: Lanes) -> Lanes:
        """total i32 [8] + u8 [32] * i8 [32] * scale, each four neighbours added; u <= 63. `spread`, i16 [16],
        has the two scales of the 32, as the method `spread` lays them.
        """
        if self.vnni:
            # A sum of four fits 16 bits; its upper half, the sign, meets a scale of 0:
            #     fours  i32  |  sum of 4  | ...  as i16  | low     high | ...
            #     spread                            i16  | scale   0    | ...
            fours = self.dot_fours(self.constant(I32, [0] * 8), u, s)
            return self.dot_pairs(total, fours.bits(I16, 16), spread)
        if self.level == "avx2":
            pairs = self._call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), u, s)
        else:
            pairs = _neighbours(u.zext(I16) * s.sext(I16))
        return total + self.madd(pairs, spread)

    def spread(self, scales: Lanes, group: int) -> Lanes:
        """i16 [16] for `scaled_dot`, of scales i16 [16]: scales[group] for the first 16 weights,
        scales[8 + group] for the rest.
        """
        first, second = group, 8 + group  # each from its own half of the register: one shuffle
        if self.vnni:  # lane 16 is a zero of the second vector
            return scales.take([first, 16] * 4 + [second, 16] * 4, self.constant(I16, [0] * 16))
        return self.pairs(scales, group)

    def signed_dot(self, total: Lanes, x: Lanes, s: Lanes, pairs: Lanes) -> Lanes:
        """total i32 [8] + i8 [32] * i8 [32] * scale, each four neighbours added; s has no -128.
        `pairs`, i16 [16], has the two scales of the 32, as the method `pairs` lays them.
        """
        if self.level == "generic":
            products = _neighbours(x.sext(I16) * s.sext(I16))
        else:  # vpmaddubsw wants one without a sign, so x gives its own to s; two of 128 * 127 fit i16
            sign = x.sar(7)
            s = self._call("llvm.x86.avx2.psign.b", s.value.type, s, x)
            kind = ir.VectorType(I16, 16)
            products = self._call("llvm.x86.avx2.pmadd.ub.sw", kind, (x ^ sign) - sign, s)
        return self.dot_pairs(total, products, pairs)

    def pairs(self, scales: Lanes, group: int) -> Lanes:
        """i16 [16] for `signed_dot`, of scales i16 [16]: scales[group] for the first 16 weights,
        scales[8 + group] for the rest.
        """
        return scales.take([group] * 8 + [8 + group] * 8)  # each from its own half: one shuffle

    def look_up(self, table: Sequence[int], q: Lanes) -> Lanes:
        """i8 [16 n]: the numbers of a table of 16 at the places q, u8 [16 n] in 0..15."""
        count = q.value.type.count
        if self.level != "generic":
            name = {16: "ssse3.pshuf.b.128", 32: "avx2.pshuf.b", 64: "avx512.pshuf.b.512"}[count]
            wide = self.constant(I8, [*table] * (count // 16))
            return self._call(f"llvm.x86.{name}", q.value.type, wide, q)
        # Without a shuffle: 16 candidates for each lane, halved by each bit of the place from the lowest on.
        numbers = [self.constant(I8, [n] * count) for n in table]
        for bit in range(4):  # of each pair the one that this bit of the place says
            odd = (q & (1 << bit)).equals(1 << bit)
            numbers = [odd.where(high, low) for low, high in zip(numbers[::2], numbers[1::2])]
        return numbers[0]

    def dot_fours(self, total: Lanes, u: Lanes, s: Lanes, wide: bool = False) -> Lanes:
        """total i32 [n] + u8 [4 n] * i8 [4 n], each four neighbours added; u <= 63, or pairs would overflow
        the i16 of vpmaddubsw, unless `wide`: then u may be any byte, and s any but -128.
        """
        if wide and not self.vnni:
            if self.level == "generic":
                return total + _neighbours(_neighbours(u.zext(I32) * s.sext(I32)))
            total = self.dot_fours(total, u & 0x7F, s)  # two of 127 * 127 fit i16, and two of 128 * 127
            return self.dot_fours(total, u & 0x80, s)
        if self.vnni:
            return self._vnni("vpdpbusd", total, u, s)
        if self.level == "avx2":
            pairs = self._call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), u, s)
        else:
            pairs = _neighbours(u.zext(I16) * s.sext(I16))
        return total + self.madd(pairs, self.constant(I16, [1] * pairs.value.type.count))

    def dot_pairs(self, total: Lanes, x: Lanes, y: Lanes) -> Lanes:
        """total i32 [n] + i16 [2 n] * i16 [2 n], neighbours added."""
        return self._vnni("vpdpwssd", total, x, y) if self.vnni else total + self.madd(x, y)

    def _vnni(self, name: str, total: Lanes, x: Lanes, y: Lanes) -> Lanes:
        count = total.value.type.count
        if llvm.llvm_version_info[0] < 21:  # operands were declared as words
            x, y = x.bits(I32, count), y.bits(I32, count)
        return self._call(f"llvm.x86.avx512.{name}.{32 * count}", total.value.type, total, x, y)

    # rows side by side

    def words(self, address: ir.Value, stride: ir.Value, rows: int) -> list[Lanes]:
        """The 16 bytes at each of `rows` addresses, `stride` apart, as four vectors i32 [rows]: the first
        word of every row, the second, the third, the fourth.
        """
        return self.words_at([self.at(address, self.b.mul(stride, I64(r))) for r in range(rows)])

    def words_at(self, addresses: Sequence[ir.Value]) -> list[Lanes]:
        """`words` of rows at any addresses."""
        # A transposition of words (r2 is the third word of row r). With eight rows, two loads make a vector:
        #
        #     parts[0]   00 01 02 03 | 40 41 42 43       rows j, j + 4, ... in the quarters of parts[j]
        #     parts[1]   10 11 12 13 | 50 51 52 53
        #     parts[2]   20 21 22 23 | 60 61 62 63
        #     parts[3]   30 31 32 33 | 70 71 72 73
        #     result[0]  00 10 20 30 | 40 50 60 70       by two `_zip`s inside the quarters
        parts = []
        for j in range(4):
            lanes = [self.load(address, I32, 4) for address in addresses[j::4]]
            while len(lanes) > 1:
                lanes = [x.take(range(2 * x.value.type.count), y) for x, y in zip(lanes[::2], lanes[1::2])]
            parts += lanes
        a, b, c, d = parts
        return [_zip(_zip(a, b, 1, h), _zip(c, d, 1, h), 2, g) for h in (0, 1) for g in (0, 1)]

    def _call(self, name: str, result: ir.Type, *args: Lanes) -> Lanes:
        """The result of LLVM's function of that name, declared in the module when first called."""
        kind = ir.FunctionType(result, [a.value.type for a in args])
        known = self.b.module.globals.get(name)
        return Lanes(
            self.b, self.b.call(known or ir.Function(self.b.module, kind, name), [a.value for a in args])
        )


def _neighbours(x: Lanes) -> Lanes:
    """Integers [2 n] -> [n]: the sums of lanes 0 and 1, 2 and 3, ..."""
    count = x.value.type.count
    return x.take(range(0, count, 2)) + x.take(range(1, count, 2))


def _zip(x: Lanes, y: Lanes, width: int, half: int) -> Lanes:
    """Within each four words of x and y, i32 [n] each, the lower (half = 0) or upper two, in turns: `width`
    words of x, as many of y.

        width 1, half 0   x0 y0 x1 y1         width 2, half 0   x0 x1 y0 y1
        width 1, half 1   x2 y2 x3 y3         width 2, half 1   x2 x3 y2 y3
    """
    count = x.value.type.count
    order = [side * count + i + w for i in range(0, 2, width) for side in (0, 1) for w in range(width)]
    return x.take([q + 2 * half + i for q in range(0, count, 4) for i in order], y)
