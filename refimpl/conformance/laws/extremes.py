"""Inputs at the ends of what they can be: quants that are all as large as they get, so that 16 bits do not
hold their sums; numbers and scales beyond halves; scales that are no number; activations that are quantized
already, or of three dimensions; an expert chosen twice; a cache that is longer than what is in it.

A recipe names its kind, its shape and its seed, so that one case can be run again by itself.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.conformance.families.attention import takes_bf16
from refimpl.conformance.inputs import arrays, draws
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.compare import Mismatch, number_of, same_bits, shown, within
from refimpl.formats import e4m3
from refimpl.ops import OPS
from refimpl.reference import fp8
from refimpl.tensors import FileWeight, Packed, ScaledFP8, ScaledInt4

if TYPE_CHECKING:
    from refimpl.conformance.trial import Trial

Recipe = dict[str, Any]
Rng = np.random.Generator
LAW = "extremes"


def cases(trial: Trial) -> Iterator[Recipe]:
    """The recipes of an operation's family; at the smoke level the first of each kind."""
    for kind in trial.family.real.get(LAW, ()):
        for recipe in KINDS[kind][0](trial):
            yield {"extreme": kind, **recipe}
            if trial.level == "smoke":
                break


def check(trial: Trial, r: Recipe) -> Mismatch | None:
    """Judge one case of numbers at the ends of their range; None where it is right."""
    return KINDS[r["extreme"]][1](trial, r)


def _judge(trial: Trial, *args: Any) -> Mismatch | None:
    return trial.judge(args, trial(*args))


# --- linear layers ------------------------------------------------------------------------------------------

PATTERNS = (0xFF, 0x00, 0x7F, 0x80, 0x0F, 0xF0)
"""Bytes that all quants are made of: the largest and the least of any width, and each beside the other."""


def _shape(trial: Trial, kind: str, rows: int, columns: int) -> tuple[int, int]:
    m = trial.manifest
    unit = max(m.columns, draws.unit_columns(kind))
    return -(-rows // m.rows) * m.rows, -(-columns // unit) * unit


def _each_kind(*counts: int) -> Callable[[Trial], Iterator[Recipe]]:
    """Every kind of weight in every mode, with so many tokens in turn."""

    def enumerate_(trial: Trial) -> Iterator[Recipe]:
        for i, v in enumerate(trial.family.variants(trial.op, trial.manifest)):
            tokens = max(counts[i % len(counts)], trial.manifest.tokens)
            yield {**v, "tokens": tokens, "seed": 151}

    return enumerate_


def _of_bytes(kind: str, pattern: int, rows: int, columns: int) -> FileWeight:
    """A matrix whose quants all are `pattern`, under scales of a sane size."""
    if kind == "plain":
        return np.full((rows, columns), np.float32(-1 if pattern & 0x80 else 1))
    if kind == "fp8":  # of the codes of NaN the neighbours
        code = {0xFF: 0xFE, 0x7F: 0x7E}.get(pattern, pattern)
        scales = np.full((-(-rows // 128), -(-columns // 128)), 2.0**-6, np.float32)
        return ScaledFP8(np.full((rows, columns), code, np.uint8), scales)
    if kind == "int4":
        scales = draws.bf16_bits(np.full((rows, columns // 32), 2.0**-6))
        return ScaledInt4(np.full((rows, columns // 2), pattern, np.uint8), scales)
    module = draws.FORMATS[kind]
    data = draws.packed(np.random.default_rng(0), module, rows, columns).data
    data[...] = pattern
    blocks = data.view(module.BLOCK)
    for name in draws.scale_fields(module):
        blocks[name] = 2.0**-6
    if not draws.scale_fields(module):  # floats, or scales that are bytes
        size = np.abs(module.dequantize(data)).reshape(*blocks.shape, module.WEIGHTS).max(axis=-1)
        blocks[~(size < 2.0**100)] = np.zeros((), module.BLOCK)
    return Packed(data, module.GGML_TYPE, (rows, columns))


def _saturated(trial: Trial, r: Recipe) -> Mismatch | None:
    """Quants all alike meet activations that all are as large as they get, of one sign and of both."""
    rows, columns = _shape(trial, r["kind"], 33, 1024)
    x = np.ones((r["tokens"], columns), np.float32)
    x[1::3] = -1
    x[2::3, ::2] = -1
    for pattern in PATTERNS:
        if wrong := _judge(trial, x, _of_bytes(r["kind"], pattern, rows, columns), r["activations"]):
            return wrong._replace(what=f"all bytes of the quants {pattern:#04x}: {wrong.what}")
    return None


OVERFLOWING = (65510.0, 65530.0)
"""Scales of activations on either side of 65,520, from where on a half is infinite."""


def _infinite_scales(trial: Trial, x: np.ndarray, w: FileWeight) -> Mismatch | None:
    """Activations so large that their scale, a half, is just a number or just none, and no result is one."""
    for step in OVERFLOWING:
        large = x.copy()
        large[:, ::32] = 127 * step
        if step < 65520:
            wrong = _judge(trial, large, w, "fp8")
        else:
            y = trial(large, w, "fp8")[0]
            wrong = _shows(y, np.ones(w.shape[0], bool)) if trial.manifest.shows_nan else None
        if wrong:
            return wrong._replace(what=f"a scale of activations of {step}: {wrong.what}")
    return None


def _least_scales(trial: Trial, x: np.ndarray, w: FileWeight) -> Mismatch | None:
    """Activations whose scale would be below the least power of two, beside weights that make them large."""
    large = ScaledFP8(w.codes, np.ldexp(w.scale, 100).astype(np.float32)) if isinstance(w, ScaledFP8) else w
    wrong = _judge(trial, np.ldexp(x, -122).astype(np.float32), large, "ue8m0")
    return wrong and wrong._replace(what=f"activations of 2^-122: {wrong.what}")


def _every_byte(trial: Trial, x: np.ndarray, r: Recipe) -> Mismatch | None:
    """A row for every scale that is a byte, up to those whose weights are beyond float32."""
    module = draws.FORMATS[r["kind"]]
    rows, columns = _shape(trial, r["kind"], 256, 32)
    w = draws.packed(np.random.default_rng(r["seed"]), module, rows, columns)
    w.data.view(module.BLOCK)["e"] = np.minimum(np.arange(rows), 252)[:, None]
    wrong = _judge(trial, np.ldexp(x[:, :columns], -12).astype(np.float32), w, r["activations"])
    return wrong and wrong._replace(what=f"a row for every scale: {wrong.what}")


def _beyond_halves(trial: Trial, r: Recipe) -> Mismatch | None:
    """Activations beyond 60,000, or so small that their scale is nothing; scales of them that are no half any
    more, or less than the least; then scales of weights whose products with sub-scales are beyond 65,504, or
    all that a byte can say.
    """
    rng = np.random.default_rng(r["seed"])
    rows, columns = _shape(trial, r["kind"], 33, 512)
    w = draws.weight(rng, r["kind"], rows, columns)
    x = rng.normal(0, 1, (r["tokens"], columns)).astype(np.float32)
    # The sums of 32 that Q8_1 keeps beside its codes are halves themselves.
    size = 2.0**9 if trial.manifest.quantized == "q8_1" else 2.0**17
    if wrong := _judge(trial, x * np.float32(size), w, r["activations"]):
        return wrong._replace(what=f"activations of {size:,.0f}: {wrong.what}")
    how = bounds.layout(w, r["activations"], trial.manifest)
    known = trial.manifest.activations == "bits" and how != "exact"
    if known and (wrong := _judge(trial, np.ldexp(x, -145).astype(np.float32), w, r["activations"])):
        return wrong._replace(what=f"activations of 2^-145: {wrong.what}")
    unusual = {"q8_0": _infinite_scales, "e4m3_ue8m0": _least_scales}.get(how)
    if unusual and (wrong := unusual(trial, x, w)):
        return wrong
    if r["kind"] == "mxfp4":
        return _every_byte(trial, x, r)
    if not isinstance(w, Packed) or not draws.half_fields(draws.FORMATS[r["kind"]]):
        return None
    blocks = w.data.view(draws.FORMATS[r["kind"]].BLOCK)
    for name in draws.half_fields(draws.FORMATS[r["kind"]]):
        blocks[name] = rng.choice([-60000.0, 60000.0], blocks.shape)
    wrong = _judge(trial, x, w, r["activations"])
    return wrong and wrong._replace(what=f"scales of 60,000: {wrong.what}")


def _same_bytes_cases(trial: Trial) -> Iterator[Recipe]:
    """Two formats whose blocks have as many bytes for as many weights."""
    kinds = {r["kind"] for r in _each_kind(1, 2, 5)(trial)}
    if {"q4_0", "iq4_nl"} <= kinds:
        yield from ({"kinds": pair, "seed": 241} for pair in (["q4_0", "iq4_nl"], ["iq4_nl", "q4_0"]))


def _same_bytes(trial: Trial, r: Recipe) -> Mismatch | None:
    """Bytes that are read in one format, and then in another."""
    rng = np.random.default_rng(r["seed"])
    first, other = (draws.FORMATS[kind] for kind in r["kinds"])
    drawn = draws.packed(rng, first, 7, 96)
    x = rng.normal(0, 1, (max(1, trial.manifest.tokens), 96)).astype(np.float32)
    for module in (first, other):
        w = Packed(drawn.data, module.GGML_TYPE, drawn.shape)
        args = x, w, "fp8" if "fp8" in trial.manifest.modes else "exact"
        if wrong := trial.judge(args, trial(*args)):
            return wrong._replace(what=f"read as {module.NAME}: {wrong.what}")
    return None


NOT_FINITE = (np.nan, np.inf, -np.inf)


def _scale_cases(trial: Trial) -> Iterator[Recipe]:
    """Kinds whose scales are floats."""
    for r in _each_kind(1, 2, 5)(trial):
        module = draws.FORMATS.get(r["kind"])
        if module is None or draws.scale_fields(module):
            yield r


def _scales_of_nothing(trial: Trial, r: Recipe) -> Mismatch | None:
    """A scale, or an E4M3 code, that is no number shows in all results of its rows, and in no others. It is
    the last of its row, of columns that 128 does not divide.
    """
    rng = np.random.default_rng(r["seed"])
    rows, columns = _shape(trial, r["kind"], 133, 800)
    w = draws.weight(rng, r["kind"], rows, columns)
    x = rng.normal(0, 1, (r["tokens"], columns)).astype(np.float32)
    ways = [(f"a scale of {v}", *_spoilt_weight(w, int(rng.integers(rows)), v)) for v in NOT_FINITE]
    if isinstance(w, ScaledFP8):
        ways.append(("a code of NaN", *_spoilt_code(w, int(rng.integers(rows)))))
    true, bound = trial.family.sums(trial.op, (x, w, r["activations"]), trial.manifest)[0]
    for what, spoilt, hit in ways:
        y = trial(x, spoilt, r["activations"])[0]
        if wrong := _shows(y, hit):
            return wrong._replace(what=f"{what}: {wrong.what}")
        if wrong := within(np.where(hit, np.float32(true), y), true, np.where(hit, np.inf, bound)):
            return wrong._replace(what=f"{what} changed other rows: {wrong.what}")
    return None


def _spoilt_code(w: ScaledFP8, row: int) -> tuple[FileWeight, np.ndarray]:
    """w with a code of NaN at the end of that row; which rows it spoils."""
    codes = w.codes.copy()
    codes[row, -1] = 0x7F
    return ScaledFP8(codes, w.scale), np.arange(w.shape[0]) == row


def _spoilt_weight(w: FileWeight, row: int, value: float) -> tuple[FileWeight, np.ndarray]:
    """w with one scale (of plain floats one number) in that row that is `value`; which rows it spoils."""
    hit = np.arange(w.shape[0]) == row
    w = arrays.copy(w)
    if isinstance(w, ScaledFP8):
        w.scale[row // 128, -1] = value
        return w, np.arange(w.shape[0]) // 128 == row // 128
    if isinstance(w, ScaledInt4):
        w.scale[row, -1] = draws.bf16_bits(np.array([value]))[0]
        return w, hit
    if isinstance(w, Packed):
        module = draws.FORMATS[next(n for n, m in draws.FORMATS.items() if w.ggml_type == m.GGML_TYPE)]
        w.data.view(module.BLOCK)[draws.scale_fields(module)[-1]][row, -1] = value
        return w, hit
    w[row, -1] = value
    return w, hit


def _shows(y: np.ndarray, hit: np.ndarray) -> Mismatch | None:
    hidden = np.argwhere(np.isfinite(y) & hit)
    if not len(hidden):
        return None
    at = tuple(int(i) for i in hidden[0])
    return Mismatch(f"{len(hidden)} results are numbers all the same", at, shown(y[at]), "nothing finite")


def _quantized_cases(trial: Trial) -> Iterator[Recipe]:
    """Where weights are FP8. A kernel of tensors must be told in which dtype to answer."""
    if trial.op == "fp8.linear" and trial.manifest.array != "numpy" and not trial.takes_parameter("dtype"):
        return
    for r in _each_kind(3)(trial):
        if r["kind"] == "fp8" and r["activations"] == "fp8":
            yield from ({**r, "tokens": t} for t in (1, 3, 20, 65) if t >= trial.manifest.tokens)


def _quantized_x(trial: Trial, r: Recipe) -> Mismatch | None:
    """Codes and scales instead of numbers, scales that `act_quant` would not have chosen among them: some
    rows of more, whose scales lie group by group.
    """
    rng, some = np.random.default_rng(r["seed"]), slice(2, 2 + r["tokens"])
    rows, columns = _shape(trial, "fp8", 131, 300)
    codes, scale = fp8.act_quant(rng.normal(0, 1, (r["tokens"] + 5, columns)).astype(np.float32))
    scale = np.asfortranarray(scale * rng.uniform(0.5, 2, scale.shape), np.float32)
    args = ScaledFP8(codes[some], scale[some]), draws.weight(rng, "fp8", rows, columns), "fp8"
    m, more = trial.manifest, {}
    if m.array == "torch" and trial.takes_parameter("dtype"):
        more = {"dtype": getattr(importlib.import_module("torch"), m.output)}
    return trial.judge(args, trial.numpy(trial.raw(*arrays.to_kernel(args, m), **more)))


def _three_dimensions(trial: Trial, r: Recipe) -> Mismatch | None:
    """x [2, T, K] gives [2, T, N], the rows of x [2 T, K]; x [K] gives [N]."""
    rng = np.random.default_rng(r["seed"])
    rows, columns = _shape(trial, r["kind"], 33, 512)
    w, tokens = draws.weight(rng, r["kind"], rows, columns), r["tokens"]
    x = rng.normal(0, 1, (2 * tokens, columns)).astype(np.float32)
    return _folded(trial, (x, w, r["activations"]), [(2, tokens)])


def _dimension_cases(trial: Trial) -> Iterator[Recipe]:
    """The last edge that has several rows."""
    if not trial.manifest.dimensions:
        return
    for r in [*trial.family.edges(trial.op, trial.manifest)][::-1]:
        if len(trial.build(r)[0]) >= max(4, 4 * trial.manifest.tokens):
            yield r
            return


def _dimensions(trial: Trial, r: Recipe) -> Mismatch | None:
    """Numbers of one, three and four dimensions give what their rows give, in these dimensions."""
    x, *rest = trial.build(r)
    half = len(x) // 2
    return _folded(trial, (x[: 2 * half], *rest), [(2, half), (half, 1, 2), (1, 2 * half)])


def _folded(trial: Trial, args: tuple, leads: list[tuple[int, ...]]) -> Mismatch | None:
    """x of two dimensions in those of `leads` before its last one; then one row alone, and none."""
    x, *rest = args
    least = trial.manifest.tokens
    more = [*([()] if least <= 1 else []), *([(0, 3), (2, 0)] if not least else [])]
    for lead in [*leads, *(more if trial.manifest.dimensions else [])]:
        flat = x[: math.prod(lead)]
        got = trial(flat.reshape(*lead, x.shape[-1]), *rest)
        if wrong := number_of(got, trial.family.results):
            return wrong
        shapes = [np.shape(y) for y in got]
        if any(shape[:-1] != lead or not shape for shape in shapes):
            given, found = [*lead, x.shape[-1]], ", ".join(str([*shape]) for shape in shapes)
            return Mismatch(f"of x {given} results have shapes {found}")
        if wrong := trial.judge((flat, *rest), tuple(y.reshape(len(flat), y.shape[-1]) for y in got)):
            return wrong._replace(what=f"x of {len(lead) + 1} dimensions: {wrong.what}")
    return None


def _heads_cases(trial: Trial) -> Iterator[Recipe]:
    if not trial.manifest.dimensions:
        return
    for r in trial.family.edges(trial.op, trial.manifest):
        if r["tokens"] > 1 and r["heads"] > 1 and r["heads"] % 2 == 0:
            yield r
            return


def _heads_of_heads(trial: Trial, r: Recipe) -> Mismatch | None:
    """x [T, 2, H/2, r] gives what x [T, H, r] gives, and [T, 0, r] nothing."""
    x, *rest = args = trial.build(r)
    (got,) = trial(x.reshape(len(x), 2, -1, x.shape[-1]), *rest)
    (none,) = trial(x[:, :0], *rest)
    if np.shape(none) != (len(x), 0, x.shape[-1]):
        return Mismatch(f"of no heads the result has shape {[*np.shape(none)]}")
    if np.shape(got) != (len(x), 2, x.shape[1] // 2, x.shape[-1]):
        return Mismatch(f"of four dimensions the result has shape {[*np.shape(got)]}")
    return trial.judge(args, (got.reshape(x.shape),))


def _growing_cases(trial: Trial) -> Iterator[Recipe]:
    """Two small edges of each variant, of kernels that keep memory from call to call; one of experts, whose
    truth takes longer.
    """
    m = trial.manifest
    if not m.concurrent or trial.brief:
        return
    edges = [r for r in trial.family.edges(trial.op, m) if r["tokens"]]
    for v in trial.family.variants(trial.op, m):
        small = [r for r in edges if v.items() <= r.items()]
        yield from small[: 1 if "hidden" in small[0] else 2]


def _growing(trial: Trial, r: Recipe) -> Mismatch | None:
    """Calls of a new thread, where nothing is kept from calls before, each with a little more to do: what is
    kept from one is nearly enough for the next, or just not.
    """
    found: list[Mismatch | None] = []
    raised: list[Exception] = []

    def grow() -> None:
        try:
            for tokens in (1, 2, 3, 5) if "hidden" in r else (1, 2, 3, 4, 5, 7, 9, 12, 2):
                with np.errstate(all="ignore"):
                    args = trial.build({**r, "tokens": max(tokens, trial.manifest.tokens)})
                    found.append(trial.judge(args, trial(*args)))
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=grow)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    wrong = next((bad for bad in found if bad), None)
    return wrong and wrong._replace(what=f"call {found.index(wrong)} of growing ones: {wrong.what}")


# --- other operations ---------------------------------------------------------------------------------------


def _ue8m0_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.takes_parameter("ue8m0"):
        yield from ({"power": p, "seed": 157} for p in (0, -20, 20, -140))


def _ue8m0(trial: Trial, r: Recipe) -> Mismatch | None:
    """Scales that are powers of two, at sizes where they are just reached and just not."""
    rng = np.random.default_rng(r["seed"])
    x = np.ldexp(rng.normal(0, 1, (5, 300)), r["power"]).astype(np.float32)
    with np.errstate(under="ignore"):
        x[:2, 7] = np.ldexp(np.float32(448), r["power"]) * np.array([1, 1 + 2.0**-23], np.float32)
    got = trial.numpy(trial.raw(*arrays.to_kernel((x,), trial.manifest), ue8m0=True))
    if wrong := number_of(got, trial.family.results):
        return wrong
    wanted = OPS[trial.op].reference(x, ue8m0=True)
    found = zip(got, wanted, trial.family.codes, trial.family.results)
    return next((bad for g, w, c, name in found if (bad := same_bits(g, w, "any", c, name))), None)


def _quantized_ue8m0_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.takes_parameter("ue8m0"):
        yield from ({"power": p, "seed": 197} for p in (0, 20))


def _quantized_ue8m0(trial: Trial, r: Recipe) -> Mismatch | None:
    """Scales that are powers of two behind another operation: the least that are not below those without,
    also of groups of zeros, and codes that stand for the same numbers within a step.
    """
    rng = np.random.default_rng(r["seed"])
    x = np.ldexp(rng.normal(0, 1, (5, 300 * 2)), r["power"]).astype(np.float32)
    x[1], x[2, :128] = 0, 0
    more = (np.ones(x.shape[1], np.float32), 1e-6) if trial.op.startswith("rms_norm") else ()
    args = arrays.to_kernel((x, *more), trial.manifest)
    (codes, scale), (other, power) = (
        trial.numpy(trial.raw(*args, **given))[-2:] for given in ({}, {"ue8m0": True})
    )
    want = np.maximum(2.0 ** np.ceil(np.log2(np.maximum(scale, 2.0**-126))), 2.0**-126).astype(np.float32)
    if wrong := same_bits(power, want, "any", name="scale") or _not_kept(trial, args, (codes, scale)):
        return wrong
    true, found, least = (_numbers(c, s) for c, s in ((codes, scale), (other, power), (1 + codes * 0, power)))
    return within(found.astype(np.float32), true, np.abs(true) / 4 + least, "numbers of the codes")


def _not_kept(trial: Trial, args: tuple, wanted: tuple) -> Mismatch | None:
    """keep=False, if the kernel has that parameter: no numbers, the same codes and scales, and nothing is
    written into x instead.
    """
    if not trial.takes_parameter("keep"):
        return None
    (before,) = map(np.copy, trial.numpy(args[0]))
    none, *got = trial.numpy(trial.raw(*args, keep=False))
    if none is not None:
        return Mismatch("numbers that were not to be kept are returned")
    (after,) = trial.numpy(args[0])
    found = zip((*got, after), (*wanted, before), ("codes", "scale", "x afterwards"))
    return next((bad for g, w, name in found if (bad := same_bits(g, w, "any", name=name))), None)


def _numbers(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What codes of groups of 128 stand for, f64."""
    return e4m3.decode(codes) * np.repeat(scale.astype(np.float64), 128, axis=-1)[:, : codes.shape[1]]


def _gate_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"tokens": max(4, trial.manifest.tokens), "seed": 227}


def _large_gates(trial: Trial, r: Recipe) -> Mismatch | None:
    """Gates whose exponential is infinite, or nothing, among others: they become themselves, or zero."""
    rng, half = np.random.default_rng(r["seed"]), 300
    x = rng.normal(0, 1, (r["tokens"], 2 * half)).astype(np.float32)
    for i, gate in enumerate((87, 89, 104, 1e4)):
        x[:, 7 + i : half : 29], x[:, 17 + i : half : 29] = gate, -gate
    return _judge(trial, x)


def _group_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.manifest.activations == "bits" and not trial.manifest.least:
        yield from ({"seed": s} for s in (163, 167))


def _groups_of_nothing(trial: Trial, r: Recipe) -> Mismatch | None:
    """Groups beside one with a NaN or an infinity are quantized as ever."""
    rng = np.random.default_rng(r["seed"])
    x = rng.normal(0, 1, (3, 400)).astype(np.float32)
    x[0, 130], x[1, 399] = np.nan, np.inf
    codes, scale = trial(x)
    want = OPS[trial.op].reference(x)
    clean = np.isfinite(want[1])
    spread = np.repeat(clean, 128, axis=-1)[:, : x.shape[1]]
    return same_bits(np.where(clean, scale, want[1]), want[1], "any", name="scale") or same_bits(
        np.where(spread, codes, want[0]), want[0], "any", True, "codes"
    )


def _chosen_cases(trial: Trial) -> Iterator[Recipe]:
    seen: Counter[str] = Counter()  # of each mode, so that none has the same ways always
    for r in _each_kind(1, 5, 9)(trial):
        way = ("twice", "zero", "negative", "other dtype")[seen[r["activations"]] % 4]
        seen[r["activations"]] += 1
        yield {**r, "count": 5, "chosen": 3, "way": way}


def _chosen(trial: Trial, r: Recipe) -> Mismatch | None:
    """An expert chosen twice by a token; weights of zero, all negative; ids of 32 bits where arrays are
    numpy's.
    """
    x, ids, weights, *rest = trial.build({**r, "blocks": 1, "hidden": 1, "x": "normal"})
    if r["way"] == "twice":  # more choices of one expert than there are tokens
        ids[:, 0] = ids[:, -1] = 2
    elif r["way"] == "zero":
        weights[:, 0], weights[-1] = 0, 0
    elif r["way"] == "negative":
        weights = -weights
    given = ids
    if r["way"] == "other dtype" and trial.manifest.array == "numpy":
        given = ids.astype(np.int32)
    if wrong := trial.judge((x, ids, weights, *rest), trial(x, given, weights, *rest)):
        return wrong
    if r["way"] != "zero" or not trial.manifest.shows_nan:
        return None
    x[-1, 0] = np.nan  # times weights of zero it is NaN still
    return _shows(trial(x, ids, weights, *rest)[0][-1:], np.ones(x.shape[1], bool))


def _length_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.takes_parameter("length"):
        base = {"heads": 3, "n": 8, "r": 4, "v": 8, "latent": 16, "seed": 173, "power": 0}
        # Once so much more room that a share of it is longer than a share of the rows.
        sizes = ((1, 0, 9), (1, 200, 1500), (1, 200, 1), (3, 5, 40), (1, 63, 65), (20, 30, 7))
        if takes_bf16(trial.manifest):  # many heads, and room for so many rows that kernels take large tiles
            many = {**base, "tokens": 1, "bf16": True}
            # Once several tiles of heads and of latents, ragged ones; few rows cost an interpreter little.
            longer = 20000 if trial.manifest.concurrent else 4400
            for p, room, heads, latent, junk in (
                (0, 4400, 40, 128, "large"),
                (300, longer, 70, 136, "nan"),
            ):
                size = {"past": p, "spare": room - p, "heads": heads, "latent": latent}
                yield {**many, **size, "junk": junk}
        for junk in ("large", "nan"):
            yield from ({**base, "tokens": t, "past": p, "spare": s, "junk": junk} for t, p, s in sizes)
            yield from (
                {**base, "tokens": t, "past": p, "spare": s, "junk": junk, "rows": 3} for t, p, s in sizes[1:]
            )


def _length(trial: Trial, r: Recipe) -> Mismatch | None:
    """A cache with room for more rows than are in it; what a truncated past left there is large, or NaN."""
    args = trial.build(r)
    q, pe, latent, k_pe, *rest = args
    left = 3000 if r["junk"] == "large" else np.nan
    junk = np.full((r["spare"], latent.shape[1] + k_pe.shape[1]), left, np.float32)
    whole = np.concatenate([np.concatenate([latent, k_pe], axis=1), junk])
    whole = arrays.narrow(whole) if r.get("bf16") else whole
    if len(rest) > 2 and trial.manifest.array == "torch":  # chosen rows are as long as the cache there
        rest[2] = np.pad(rest[2], ((0, 0), (0, r["spare"])))
    longer = (q, pe, whole[:, : latent.shape[1]], whole[:, latent.shape[1] :], *rest)
    count: Any = len(latent)
    if trial.manifest.array == "torch":
        count = arrays.to_kernel(np.array(count), trial.manifest)
    got = trial.numpy(trial.raw(*arrays.to_kernel(longer, trial.manifest), length=count))
    return trial.judge(args, got)


def _index_length_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.takes_parameter("length"):
        base = {"heads": 3, "d": 16, "topk": 5, "x": "integers", "seed": 233}
        for tokens, past, spare in ((1, 20, 9), (3, 0, 40), (20, 30, 7)):
            sizes = {"tokens": max(tokens, trial.manifest.tokens), "past": past, "spare": spare}
            yield from ({**base, **sizes, "activations": a} for a in ("exact", "fp8", "ue8m0"))


def _index_length(trial: Trial, r: Recipe) -> Mismatch | None:
    """Keys with room for more rows than are there. What is left in it would be the best, or is NaN."""
    q, k, weights, topk, _, activations = trial.build(r)
    m, count = trial.manifest, len(k)
    given: Any = arrays.to_kernel(np.array(count), m) if m.array == "torch" else count
    for left in (100, np.nan):
        room = np.concatenate([k, np.full((r["spare"], k.shape[1]), left, np.float32)])
        got = trial.numpy(
            trial.raw(*arrays.to_kernel((q, room, weights, topk), m), length=given, activations=activations)
        )
        if m.array == "torch" and np.shape(got[0]) == (len(q), len(room)):  # as long as the cache there
            if got[0][:, count:].any():
                return Mismatch("a row that is not there is chosen")
            got = (got[0][:, :count], *got[1:])
        if wrong := trial.judge((q, k, weights, topk, None, activations), got):
            return wrong
    return None


def _lost_cases(trial: Trial) -> Iterator[Recipe]:
    """Where equals are ordered as the reference does it, NaN is too."""
    m = trial.manifest
    if m.ties == "lowest" and m.order == "best first":
        base = {"groups": 8, "width": 4, "kept": 4, "chosen": 8, "normalize": True, "x": "normal"}
        for i, kind in enumerate(draws.routers(m.scores)):
            yield {**base, "tokens": max(2, m.tokens), "kind": kind, "lost": 13 * i, "seed": 199}
            more = {"groups": 1, "width": 8, "kept": 1, "chosen": 7, "lost": 1, "also": 5}
            yield {**base, **more, "tokens": max(2, m.tokens), "kind": kind, "seed": 199}


def _lost(trial: Trial, r: Recipe) -> Mismatch | None:
    """An expert whose bias is NaN is chosen last, and so are all of its group where groups are chosen; of two
    such, the first. An infinite bias is as good as a large one.
    """
    x, weight, bias, c = trial.build(r)
    width = len(bias) // c.n_group if c.topk_group < c.n_group else 1
    spoilt, shunned, first = bias.copy(), bias.copy(), r["lost"] // width * width
    spoilt[r["lost"]] = np.nan
    shunned[first : first + width] = -(2.0**100)
    if "also" in r:
        spoilt[r["also"]], shunned[r["also"]] = np.nan, -(2.0**101)
    pairs: list[tuple[np.ndarray, ...]] = [(spoilt, shunned)]
    if c.scoring_func == "sigmoid" and "also" not in r:  # others have no bias
        place = np.arange(len(bias)) == 3
        pairs += [
            tuple(np.where(place, np.float32(sign * large), bias) for large in (np.inf, 2.0**100))
            for sign in (1, -1)
        ]
    for biases in pairs:
        got, want = (trial(x, weight, b, c) for b in biases)
        found = zip(got, want, trial.family.results)
        if wrong := next((bad for g, w, name in found if (bad := same_bits(g, w, name=name))), None):
            return wrong
    return None


def _nothing_cases(trial: Trial) -> Iterator[Recipe]:
    base = {"groups": 4, "width": 4, "kept": 2, "chosen": 4, "normalize": True, "x": "normal", "seed": 223}
    if "sigmoid" in draws.routers(trial.manifest.scores):
        yield {**base, "tokens": max(2, trial.manifest.tokens), "kind": "sigmoid"}


def _nothing(trial: Trial, r: Recipe) -> Mismatch | None:
    """Scores that all vanish, and whose sum nothing may be divided by, give weights of zero; infinite logits
    are scores of zero and one.
    """
    x, weight, bias, c = trial.build(r)
    ones, whole = np.ones_like(x), c.routed_scaling_factor / c.num_experts_per_tok
    infinite = ones.copy()
    infinite[:, 0] = np.inf
    cases = [(ones, -8, 0.0)]  # logits of -256
    cases += [(infinite, -8, 0.0), (infinite, 8, whole)] if trial.manifest.shows_nan else []
    for given, factor, true in cases:
        got = trial(given, np.full_like(weight, factor), bias, c)[1]
        if wrong := within(
            got, np.full(got.shape, true), np.full(got.shape, 2.0**-126 + true / 2**20), "weights"
        ):
            return wrong
    return None


def _vanishing_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.manifest.activations == "bits" and not trial.manifest.least:
        yield {"seed": 191}


def _vanishing(trial: Trial, r: Recipe) -> Mismatch | None:
    """Groups or tiles so small that their scale is subnormal, or nothing though they are something."""
    rng, powers = np.random.default_rng(r["seed"]), np.array([-149, -146, -142, -141, -140, -137, -126, 0])
    x = np.ldexp(rng.integers(-8, 9, (8, 300)).astype(np.float64), powers[:, None])
    height = 128 if trial.op.endswith("weight_quant") else 1
    return _judge(trial, np.repeat(x, height, axis=0).astype(np.float32))


def _tiny_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"seed": 181}


def _tiny_groups(trial: Trial, r: Recipe) -> Mismatch | None:
    """Blocks so small that their scale, or its inverse, is nothing or infinite; others between them."""
    unit, rng = draws.FORMATS[trial.op.partition(".")[0]].WEIGHTS, np.random.default_rng(r["seed"])
    powers = np.array([0, -149, -130, -1, -126, -100, 3, -80, -66, -40, -24, 0])
    x = np.ldexp(rng.uniform(-1, 1, (2, len(powers), unit)), powers[:, None])
    return _judge(trial, x.astype(np.float32).reshape(2, -1))


def _shifted_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"seed": 223}


def _shifted(trial: Trial, r: Recipe) -> Mismatch | None:
    """Blocks of numbers close to each other and far from zero: what they begin from is beyond a half, or just
    not, and their steps are not.
    """
    unit, rng = draws.FORMATS[trial.op.partition(".")[0]].WEIGHTS, np.random.default_rng(r["seed"])
    offsets = np.outer((-1, 1), (6e4, 65503, 65519, 65521, 7e4, 1e6)).ravel()
    x = offsets[:, None] + rng.uniform(-8, 8, (2, len(offsets), unit))
    return _judge(trial, x.astype(np.float32).reshape(2, -1))


def _spoiled_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"seed": 193}


MANY = 3 * 512 * 257
"""Numbers that are work for several threads, an odd number of blocks."""


def _alone_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"seed": 211}


def _spoiled_alone(trial: Trial, r: Recipe) -> Mismatch | None:
    """A block beyond any scale at the beginning of work for several threads becomes what it does alone, and
    those behind it what they do beside zeros.
    """
    unit, rng = draws.FORMATS[trial.op.partition(".")[0]].WEIGHTS, np.random.default_rng(r["seed"])
    x = rng.normal(0, 1, MANY).astype(np.float32)
    x[:unit] = np.copysign(np.float32(2.0**100), x[:unit])
    beside = x.copy()
    beside[:unit] = 0
    _soiled(trial, rng, x)
    got, want, alone = (trial(y)[0] for y in (x, beside, x[:unit]))
    return same_bits(got[len(alone) :], want[len(alone) :]) or same_bits(got[: len(alone)], alone)


def _spoiled_blocks(trial: Trial, r: Recipe) -> Mismatch | None:
    """Blocks beyond any scale: whatever becomes of them, those between are what they are beside zeros."""
    unit, rng = draws.FORMATS[trial.op.partition(".")[0]].WEIGHTS, np.random.default_rng(r["seed"])
    x = rng.normal(0, 1, (2, 9, unit)).astype(np.float32)
    x[:, ::3] *= np.float32(2.0**100)
    beside, given = x.copy(), [x]
    beside[:, ::3] = 0
    for value in NOT_FINITE:  # each alone: one may hide what becomes of another
        spoilt = beside.copy()
        spoilt[:, ::3, unit // 2] = value
        # Quantizers that search refuse what is no number.
        given += [spoilt] if trial.manifest.shows_nan and not _refuses(trial.op, spoilt) else []
    (want,), kept = (y.reshape(2, 9, -1) for y in trial(beside.reshape(2, -1))), np.arange(9) % 3 > 0
    for y in given:
        _soiled(trial, rng, y.reshape(2, -1))
        got = trial(y.reshape(2, -1))[0].reshape(2, 9, -1)
        if wrong := same_bits(got[:, kept], want[:, kept]):
            return wrong
    return None


def _soiled(trial: Trial, rng: np.random.Generator, x: np.ndarray) -> None:
    """Leave the results of other numbers, as many as x, in memory that is given back: a result that is not
    written is then not right by chance.
    """
    trial(rng.normal(0, 1, x.shape).astype(np.float32))


def _refuses(op: str, x: np.ndarray) -> bool:
    """Whether the reference raises an exception for these blocks."""
    try:
        OPS[op].reference(x.reshape(len(x), -1))
    except ValueError:
        return True
    return False


def _spoiled_tiles(trial: Trial, r: Recipe) -> Mismatch | None:
    """The same of tiles with a number that is none."""
    rng, m = np.random.default_rng(r["seed"]), trial.manifest
    n, k = (-(-300 // unit) * unit for unit in (m.rows, m.columns))
    beside = rng.normal(0, 1, (n, k)).astype(np.float32)
    beside[:128, :128], beside[-1:, -1:] = 0, 0
    x = beside.copy()
    x[5, 7], x[-1, -1] = np.inf, np.nan
    whole = np.ones((n, k), bool)
    whole[:128, :128], whole[(n - 1) // 128 * 128 :, (k - 1) // 128 * 128 :] = False, False
    _soiled(trial, rng, x)
    (codes, scale), (other, factor) = (trial(y) for y in (x, beside))
    tiles = whole[::128, ::128]
    return same_bits(codes[whole], other[whole]) or same_bits(scale[tiles], factor[tiles])


def _code_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"seed": 179}


def _tiles(trial: Trial, r: Recipe) -> Mismatch | None:
    """Tile scales that are no number spoil their tile; large codes under the largest scales overflow."""
    rng = np.random.default_rng(r["seed"])
    rows, columns = (-(-n // u) * u for n, u in ((300, trial.manifest.rows), (300, trial.manifest.columns)))
    scale = np.ones((-(-rows // 128), -(-columns // 128)), np.float32)
    scale[0, 1], scale[1, 0], scale[1, 1], scale[-1, -1] = np.nan, np.inf, 2.0**127, 2.0**-140
    codes = rng.integers(0, 256, (rows, columns), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    return _judge(trial, ScaledFP8(codes, scale))


KINDS: dict[str, tuple[Callable[[Trial], Iterator[Recipe]], Callable[[Trial, Recipe], Mismatch | None]]] = {
    "saturated": (_each_kind(4, 1, 9, 2), _saturated),
    "beyond_halves": (_each_kind(1, 3, 9), _beyond_halves),
    "scales_of_nothing": (_scale_cases, _scales_of_nothing),
    "same_bytes": (_same_bytes_cases, _same_bytes),
    "quantized_x": (_quantized_cases, _quantized_x),
    "three_dimensions": (_each_kind(1, 3, 5), _three_dimensions),
    "dimensions": (_dimension_cases, _dimensions),
    "heads": (_heads_cases, _heads_of_heads),
    "growing": (_growing_cases, _growing),
    "ue8m0": (_ue8m0_cases, _ue8m0),
    "quantized_ue8m0": (_quantized_ue8m0_cases, _quantized_ue8m0),
    "large_gates": (_gate_cases, _large_gates),
    "groups_of_nothing": (_group_cases, _groups_of_nothing),
    "chosen": (_chosen_cases, _chosen),
    "length": (_length_cases, _length),
    "index_length": (_index_length_cases, _index_length),
    "lost": (_lost_cases, _lost),
    "nothing": (_nothing_cases, _nothing),
    "tiles": (_code_cases, _tiles),
    "tiny_groups": (_tiny_cases, _tiny_groups),
    "shifted": (_shifted_cases, _shifted),
    "vanishing": (_vanishing_cases, _vanishing),
    "spoiled_blocks": (_spoiled_cases, _spoiled_blocks),
    "spoiled_alone": (_alone_cases, _spoiled_alone),
    "spoiled_tiles": (_spoiled_cases, _spoiled_tiles),
}
