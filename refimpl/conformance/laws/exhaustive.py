"""Laws with enumerated inputs: every half-precision scale, every code, every column, every product of scale,
sub-scale and quant.

A recipe names its kind and its part, so that one part can be run again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.conformance.families.linear import STACKS
from refimpl.conformance.inputs import arrays, draws, products
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.compare import Mismatch, within
from refimpl.formats import e4m3
from refimpl.tensors import ScaledFP8

if TYPE_CHECKING:
    from refimpl.conformance.trial import Trial

Recipe = dict[str, Any]
PARTS = 8  # of the 65,536 halves, so that no array is large; each has halves of every exponent


def cases(name: str) -> Callable[[Trial], Iterator[Recipe]]:
    """The recipes of a family's fixed law."""

    def enumerate_(trial: Trial) -> Iterator[Recipe]:
        if kind := trial.family.fixed.get(name):
            yield from ({"fixed": kind, **recipe} for recipe in KINDS[kind][0](trial))

    return enumerate_


def check(trial: Trial, r: Recipe) -> Mismatch | None:
    """Judge one part of a small domain that is gone through whole; None where it is right."""
    return KINDS[r["fixed"]][1](trial, r)


def _judge(trial: Trial, *args: Any) -> Mismatch | None:
    return trial.judge(args, trial(*args))


# --- formats ------------------------------------------------------------------------------------------------


def _module(trial: Trial) -> Any:
    return draws.FORMATS[trial.op.partition(".")[0]]


def _block_cases(trial: Trial) -> Iterator[Recipe]:
    module = _module(trial)
    if not module.BLOCK.names:
        yield from ({"part": p, "way": "patterns"} for p in range(PARTS if _long(trial) else 1))
        return
    yield from ({"part": p, "way": "halves"} for p in range(PARTS if trial.level != "smoke" else 1))
    if not draws.scale_fields(module):
        yield {"part": 0, "way": "all scales"}
    elif _long(trial) and draws.half_fields(module):
        yield from ({"part": p, "way": "products"} for p in range(64 * PARTS))


def _long(trial: Trial) -> bool:
    return trial.level not in ("smoke", "quick")


def _blocks(trial: Trial, r: Recipe) -> Mismatch | None:
    """Every half as every scale of a block; beyond the quick level with every sub-scale and every quant.
    Scales of a byte are integers of the block like sub-scales, so that "all scales" has all of them.
    """
    module, rng = _module(trial), np.random.default_rng(r["part"])
    if r["way"] == "patterns":
        return _judge(trial, _patterns(module, r["part"], trial.level).view(np.uint8).copy())
    halves = np.arange(65536, dtype="<u2")
    if r["way"] == "halves":
        b = rng.integers(0, 256, 65536 // PARTS * module.BLOCK.itemsize, np.uint8).view(module.BLOCK)
        return _judge(trial, _with_halves(module, b, halves[r["part"] :: PARTS]).view(np.uint8))
    b = products.blocks(module)
    if r["way"] == "all scales":
        return _judge(trial, b.view(np.uint8))
    halves = halves.reshape(64 * PARTS, -1)[r["part"]]
    return _judge(
        trial, _with_halves(module, np.tile(b, len(halves)), np.repeat(halves, len(b))).view(np.uint8)
    )


def _patterns(module: Any, part: int, level: str) -> np.ndarray:
    """All patterns of 16 bits; of 32 bits some millions, spread evenly."""
    if module.BLOCK.itemsize == 2:
        return np.arange(65536, dtype="<u2")
    return np.arange(part, 2**32, 4093 if level in ("smoke", "quick") else 509, dtype=np.uint64).astype("<u4")


def _with_halves(module: Any, blocks: np.ndarray, halves: np.ndarray) -> np.ndarray:
    for i, name in enumerate(draws.half_fields(module)):
        blocks[name].view("<u2")[...] = halves * np.uint16(2 * i + 1) + np.uint16(
            i
        )  # an odd factor: all patterns again, in another order
    return blocks


def _codes(trial: Trial, r: Recipe) -> Mismatch | None:
    return _judge(trial, np.arange(256, dtype=np.uint8))


def _float_cases(trial: Trial) -> Iterator[Recipe]:
    yield from ({"way": w, "part": 0} for w in ("halves", "ties", "spread"))
    if trial.level == "exhaustive":
        yield from ({"way": "all", "part": p} for p in range(256))


def _floats(trial: Trial, r: Recipe) -> Mismatch | None:
    """E4M3 codes of all halves, of ties and the numbers beside them, and of patterns spread over the whole
    range.
    """
    if r["way"] == "halves":
        return _judge(trial, np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))
    if r["way"] == "ties":
        ties = (e4m3.TABLE[:126] + e4m3.TABLE[1:127]) / np.float32(2)
        edges = np.concatenate([ties, np.array([448, 464, 480, 1e38, np.inf, np.nan], np.float32)])
        x = np.concatenate([edges, *(np.nextafter(edges, np.float32(to)) for to in (0, np.inf))])
        return _judge(trial, np.concatenate([x, -x]))
    step, start = (
        ({"smoke": 65521, "quick": 65521, "full": 4093, "exhaustive": 509}[trial.level], 0)
        if r["way"] == "spread"
        else (1, r["part"] << 24)
    )
    end = 2**32 if r["way"] == "spread" else start + 2**24
    return _judge(trial, np.arange(start, end, step, dtype=np.uint64).astype(np.uint32).view(np.float32))


def _scale_cases(trial: Trial) -> Iterator[Recipe]:
    module = _module(trial)
    if module.NAME == "Q8_0":
        yield {"way": "ties between halves"}
    if not module.BLOCK.names:
        yield {"way": "patterns"}
        yield {"way": "ties"}


def _scales(trial: Trial, r: Recipe) -> Mismatch | None:
    """Every half, and every tie between two, as the scale that a block of Q8_0 gets; all kinds of floats
    through bf16 and f16.
    """
    if r["way"] == "patterns":
        x = (
            np.arange(0, 2**32, 509 if _long(trial) else 65521, dtype=np.uint64)
            .astype(np.uint32)
            .view(np.float32)
        )
        return _judge(trial, x[~np.isnan(x)] if trial.manifest.nan == "any" else x)
    if r["way"] == "ties":  # between neighbours of sixteen bits, and what lies beside the ties
        x = (
            (np.arange(0x8000, 2**32, 2**16)[:, None] + np.array([-1, 0, 1]))
            .astype(np.uint32)
            .view(np.float32)
        )
        return _judge(trial, x[~np.isnan(x)])
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    d = np.concatenate([halves, (halves[1:] + halves[:-1]) / np.float32(2)])
    x = np.zeros((len(d), 32), np.float32)
    x[:, 7] = d * np.float32(-127)
    return _judge(trial, x)


def _group_cases(trial: Trial) -> Iterator[Recipe]:
    yield from ({"way": w} for w in ("codes", "ties", "odd", "zeros"))


def _groups(trial: Trial, r: Recipe) -> Mismatch | None:
    """act_quant: every code and every tie under scales that are powers of two, and ("odd") every tie under
    scales of few bits, which leave it exact while their reciprocals do not; groups of zeros.
    """
    if r["way"] == "zeros":
        x = np.zeros((4, 256), np.float32)
        x[1, 128:], x[2] = 1, -0.0
        return _judge(trial, x)
    numbers = (
        e4m3.TABLE[:127]
        if r["way"] == "codes"
        else np.append((e4m3.TABLE[:126] + e4m3.TABLE[1:127]) / np.float32(2), np.float32(448))
    )
    row = np.append(numbers, np.float32(448))
    scales = np.arange(65, 128, 2) / 64 if r["way"] == "odd" else np.ldexp(1.0, np.arange(-20, 21))
    x = row * scales.astype(np.float32)[:, None]
    return _judge(trial, np.concatenate([x, -x]))


def _tile(trial: Trial, r: Recipe) -> Mismatch | None:
    """Every code under scales of every power of two that leaves it normal, in the second of two tiles too."""
    width = 130 if trial.manifest.columns == 1 else 2 * 128
    codes = np.arange(256, dtype=np.uint8)[:, None].repeat(width, axis=1)
    scale = np.ldexp(np.float32(1.25), np.array([[r["power"], 3], [-3, r["power"]]])).astype(np.float32)
    return _judge(trial, ScaledFP8(codes, scale))


# --- linear layers ------------------------------------------------------------------------------------------


def _near(trial: Trial, got: np.ndarray, true: np.ndarray, bound: np.ndarray) -> Mismatch | None:
    """Within the bound, and what rounding to the declared dtype adds to it."""
    allowed = bounds.stored(trial.manifest, bounds.Sum(true, np.broadcast_to(bound, true.shape)))
    return within(got, true, allowed.bound)


def _weight_cases(trial: Trial) -> Iterator[Recipe]:
    for v in trial.family.variants(trial.op, trial.manifest):
        yield {**v, "tokens": max(1, trial.manifest.tokens)}


def _every_code_cases(trial: Trial) -> Iterator[Recipe]:
    for r in _weight_cases(trial):
        if r["kind"] == "fp8":
            yield from ({**r, "tokens": max(r["tokens"], few)} for few in (1, 4, 9))


def _every_code(trial: Trial, r: Recipe) -> Mismatch | None:
    """A row for every FP8 code, met by one number: the code's value, NaN too."""
    m = trial.manifest
    columns = -(-128 // m.columns) * m.columns
    w = ScaledFP8(
        np.arange(256, dtype=np.uint8)[:, None].repeat(columns, axis=1),
        np.full((2, -(-columns // 128)), 0.5, np.float32),
    )
    x = np.zeros((r["tokens"], columns), np.float32)
    x[:, 3] = 448 * 2.0**-3
    want = e4m3.TABLE * np.float32(28)
    true = np.broadcast_to(want, (len(x), 256)).astype(np.float64)
    return _near(trial, trial(x, w, r["activations"])[0], true, 0.0 * true)


def _one_hot(trial: Trial, r: Recipe) -> Mismatch | None:
    """x = e_k gives column k: exactly where x is not quantized, else up to the roundings of a single
    product.
    """
    rng, m = np.random.default_rng(29), trial.manifest
    rows = -(-130 // m.rows) * m.rows if r["kind"] == "fp8" else 5 * m.rows
    unit = draws.unit_columns(r["kind"])
    columns = -(-(2 * unit if unit > 1 else 256) // m.columns) * m.columns
    w = draws.weight(rng, r["kind"], rows, columns)
    x = np.zeros((columns, columns), np.float32)
    exact = bounds.layout(w, r["activations"], m) == "exact"
    np.fill_diagonal(x, 1.0 if exact else -127.0)
    got = trial(x, w, r["activations"])[0]
    if exact and m.accumulation in ("float32", "float64"):
        true = bounds.dense(w).exact.T.astype(np.float32)
        return _near(trial, got, true.astype(np.float64), np.zeros(true.shape))
    true_, bound = bounds.one_hot(m, x, w, r["activations"])
    return _near(trial, got, true_, np.maximum(bound, bounds.gamma(6, m.unit) * np.abs(true_)))


def _integer_cases(trial: Trial) -> Iterator[Recipe]:
    for r in _weight_cases(trial):
        module = draws.FORMATS.get(r["kind"])
        whole = trial.manifest.quantized != "e4m3"  # whose codes are not all integers of a size
        if module is not None and draws.scale_fields(module) and r["activations"] == "fp8" and whole:
            yield r


def _integers(trial: Trial, r: Recipe) -> Mismatch | None:
    """Scales of a power of two and small integer activations: no sum reaches 2^24, so nothing is rounded, in
    any order.
    """
    module, rng, m = draws.FORMATS[r["kind"]], np.random.default_rng(31), trial.manifest
    columns = -(-module.WEIGHTS // m.columns) * m.columns
    w = draws.packed(rng, module, 64 * m.rows, columns)
    for name in draws.scale_fields(module):
        w.data.view(module.BLOCK)[name] = 2.0**-3
    x = rng.integers(-3, 4, (max(5, m.tokens), columns)).astype(np.float32)
    wide = module.WEIGHTS == 256 and not m.quantized
    x[:, 7 :: 256 if wide else 32] = -127  # so that the step of the activations is one
    true, dense = x.astype(np.float64), bounds.dense(w)
    unit = m.unit if m.unit > bounds.F32 else 0.0
    bound = unit * columns * (np.abs(true) @ dense.size.T)
    return _near(trial, trial(x, w, r["activations"])[0], true @ dense.exact.T, bound)


# --- stacks of experts --------------------------------------------------------------------------------------


def _stack_cases(trial: Trial) -> Iterator[Recipe]:
    for v in trial.family.variants(trial.op, trial.manifest):
        packed = not {"fp8", "int4", "plain"} & set(STACKS[v["kind"]])  # one array a stack
        if packed and v["activations"] == "fp8" and trial.manifest.array == "numpy":
            yield v
            return


def _big_stacks(trial: Trial, r: Recipe) -> Mismatch | None:
    """The last expert of sparse stacks that are larger than 2^31 bytes."""
    small = trial.build(
        {
            **r,
            "tokens": max(2, trial.manifest.tokens),
            "blocks": 1,
            "hidden": 1,
            "x": "normal",
            "seed": 37,
            "count": 1,
            "chosen": 1,
        }
    )
    x, ids, weights, *sides, mode = small
    count = 2**31 // min(s.data[0].nbytes for s in sides) + 2
    # Prepared before they are large: nobody rearranges gigabytes of zeros.
    prepare = trial.prepare if trial.manifest.prepare else lambda w: w
    big = [arrays.big_stack(prepare(s.expert(0)), count) for s in sides]
    return trial.judge(small, trial(x, np.full_like(ids, count - 1), weights, *big, mode))


def _single(trial: Trial) -> Iterator[Recipe]:
    yield {}


KINDS: dict[str, tuple[Callable[[Trial], Iterator[Recipe]], Callable[[Trial, Recipe], Mismatch | None]]] = {
    "blocks": (_block_cases, _blocks),
    "codes": (_single, _codes),
    "floats": (_float_cases, _floats),
    "scales": (_scale_cases, _scales),
    "groups": (_group_cases, _groups),
    "tile": (lambda trial: ({"power": p} for p in (-100, -20, -1, 0, 7, 100)), _tile),
    "every_code": (_every_code_cases, _every_code),
    "one_hot": (_weight_cases, _one_hot),
    "integers": (_integer_cases, _integers),
    "big_stacks": (_stack_cases, _big_stacks),
}
