"""Two checkpoints tensor by tensor, as the numbers they stand for: `python -m refimpl.diff A B`, A and B
hybrid folders, checkpoints or GGUFs.

Names are Hugging Face's, the experts of a layer one stack, kv_b whole. A is what B is measured by:

    relative error   ||A - B|| / ||A||        SQNR   -20 log10 of it, in dB        max   the largest |A - B|

Rows are decoded a few at a time, so a checkpoint of any size takes little memory.
"""

from __future__ import annotations

import fnmatch
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats
from refimpl.checkpoint import codecs, names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import Parser, number, run, to_json
from refimpl.config import DeepSeekConfig
from refimpl.errors import printable, refusal
from refimpl.files import chunks
from refimpl.reference.experts import pick
from refimpl.tensors import Packed, ScaledFP8, ScaledInt4, Stack, TensorInfo, Weight

PIECE = 1 << 21  # weights decoded at a time, of each side
HALVES = ("attn_k_b.weight", "attn_v_b.weight")
NOT_OF_THE_MODEL = {
    "bos_token_id",
    "eos_token_id",
    "num_nextn_predict_layers",
    "max_position_embeddings",
    "scale_fmt",
}  # of its config
SHOWN = 3  # of what may be many, in one line


class Row(NamedTuple):
    """One tensor of both. A figure is None where there is nothing to measure: a shape that differs, infinite
    or no error.
    """

    name: str
    state: str  # "same", "different", "shape", "not decoded", "only in A" or "only in B"
    types: tuple[str, str]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    max_abs: float | None = None
    relative: float | None = None
    sqnr_db: float | None = None
    differing: int = 0  # weights that are not equal; NaN equals NaN
    not_finite: int = 0  # of those, where one side is NaN or infinite

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


class Moments:
    """Sums over pairs of pieces, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = 0.0
        self.differing = self.not_finite = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add the differences of two equally shaped pieces of a tensor, f32 [R, K] each."""
        differs = a != b
        differs &= ~(np.isnan(a) & np.isnan(b))
        self.differing += int(np.count_nonzero(differs))
        finite = np.isfinite(a) & np.isfinite(b)
        self.not_finite += int(np.count_nonzero(differs & ~finite))
        if not finite.all():
            a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        error = np.subtract(a, b, dtype=np.float64)
        self.noise += float(np.vdot(error, error))
        self.largest = max(self.largest, float(np.abs(error).max(initial=0)))
        self.signal += float(np.square(a, dtype=np.float64).sum())

    def figures(self) -> tuple[float | None, float | None, float | None]:
        """max, relative error and SQNR; no SQNR without an error, and neither where A is all zeros."""
        if self.not_finite:
            return None, None, None
        if not self.noise or not self.signal:
            return self.largest, 0.0 if not self.noise else None, None
        relative = math.sqrt(self.noise / self.signal)
        return self.largest, relative, -20 * math.log10(relative)


def pieces(weight: Weight | Stack, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The tensor as f32 [R, K] pieces from the first row to the last; where they are cut depends on the shape
    alone.
    """
    rows, columns = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    step = max(PIECE // columns // 128, 1) * 128  # whole tiles of FP8
    for e in range(shape[0] if len(shape) == 3 else 1):
        matrix = pick(weight, e) if len(shape) == 3 else weight
        for at in range(0, rows, step):
            yield _rows(matrix, at, min(at + step, rows), columns)


def _rows(w: Any, start: int, stop: int, columns: int) -> np.ndarray:
    if isinstance(w, ScaledFP8):
        return codecs.dense(ScaledFP8(w.codes[start:stop], w.scale[start // 128 : -(-stop // 128)]))
    if isinstance(w, ScaledInt4):
        return codecs.dense(ScaledInt4(w.codes[start:stop], w.scale[start:stop]))
    if isinstance(w, Packed):
        rows = w.data.reshape(math.prod(w.shape[:-1]), -1)[start:stop]
        return codecs.dense(Packed(rows, w.ggml_type, (stop - start, columns)))
    return np.asarray(w).reshape(-1, columns)[start:stop]


def type_of(checkpoint: Checkpoint, name: str) -> str:
    """How the file has it: "F8_E4M3", "BF16", a GGML type; all that occur among the experts of a stack or the
    halves of kv_b.
    """
    stored = "+".join(dict.fromkeys(info.dtype for info in checkpoint.stored(name)))
    if _undecoded(stored):
        return stored
    weight = checkpoint[name]
    return formats.type_name(weight.ggml_type) if isinstance(weight, Packed) else stored


def _undecoded(types: str) -> list[str]:
    """Those of the types, joined by +, that are known by name only."""
    return [t for t in types.split("+") if t in formats.KNOWN_UNSUPPORTED.values()]


def tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """{HF name: GGUF name} of what is compared: the halves of a kv_b that is there whole, or can be made
    whole, are left out.
    """
    found = [
        n
        for n in checkpoint
        if not (n.endswith(HALVES) and n.rpartition("attn_")[0] + "attn_kv_b.weight" in checkpoint)
    ]
    return {names.to_hf(n): n for n in sorted(found, key=_place)}


def _place(name: str) -> tuple[float, str]:
    """The embedding, the layers in order, the final norm and the head."""
    layer = names.layer_of(name)
    return (
        layer if layer is not None else -1 if name.startswith("token_embd") else math.inf,
        names.to_hf(name),
    )


def compare(a: Checkpoint, b: Checkpoint, glob: str = "*") -> Iterator[Row]:
    """A row a tensor, in the model's order; `glob` chooses by HF or by GGUF name."""
    ours, theirs = tensors(a), tensors(b)
    for hf, gguf in sorted((ours | theirs).items(), key=lambda item: _place(item[1])):
        if fnmatch.fnmatchcase(hf, glob) or fnmatch.fnmatchcase(gguf, glob):
            types = (type_of(a, gguf) if hf in ours else "", type_of(b, gguf) if hf in theirs else "")
            sides = [(c, hf in names) for c, names in ((a, ours), (b, theirs))]
            if any(map(_undecoded, types)):
                yield _undecoded_row(hf, types, *(c.stored(gguf) if there else None for c, there in sides))
            else:
                yield _row(hf, types, *(c[gguf] if there else None for c, there in sides))


def _undecoded_row(name: str, types: tuple[str, str], a: Any, b: Any) -> Row:
    """Tensors of a type that is not decoded here: the same where their bytes are."""
    shapes = tuple(None if infos is None else (*infos[0].shape,) for infos in (a, b))
    if a is None or b is None:
        return Row(name, "only in B" if a is None else "only in A", types, shapes)  # type: ignore[arg-type]
    same = types[0] == types[1] and len(a) == len(b) and all(map(_same_bytes, a, b))
    return Row(name, "same" if same else "not decoded", types, shapes)  # type: ignore[arg-type]


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    pieces = (chunks(i.path, i.offset, i.nbytes) for i in (a, b))
    return a.nbytes == b.nbytes and all(x == y for x, y in zip(*pieces, strict=True))


def _row(name: str, types: tuple[str, str], a: Any, b: Any) -> Row:
    shapes = (None if a is None else tuple(a.shape), None if b is None else tuple(b.shape))
    if a is None or b is None:
        return Row(name, "only in B" if a is None else "only in A", types, shapes)
    if shapes[0] != shapes[1]:
        return Row(name, "shape", types, shapes)
    found = Moments()
    for x, y in zip(pieces(a, a.shape), pieces(b, b.shape), strict=True):
        found.add(x, y)
    largest, relative, sqnr = found.figures()
    return Row(
        name,
        "different" if found.differing else "same",
        types,
        shapes,
        largest,
        relative,
        sqnr,
        found.differing,
        found.not_finite,
    )


def passes(row: Row, least: float | None) -> bool:
    """Whether the tensor is the same, or near enough: an SQNR of at least so many dB."""
    return row.state == "same" or (least is not None and row.sqnr_db is not None and row.sqnr_db >= least)


def other_models(a: Checkpoint, b: Checkpoint, norms: list[Row], failed: list[Row]) -> str | None:
    """Why A and B are not two forms of one model, or None: their configs differ, or norms are among what
    failed, and no quantizer touches those.
    """
    sizes = [(DeepSeekConfig.from_dict(c.config, where=c.folder), c) for c in (a, b)]
    ours, theirs = ({k: v for k, v in vars(c).items() if k not in NOT_OF_THE_MODEL} for c, _ in sizes)
    differing = [f"{k} {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    if differing:
        return f"their configs differ: {_some(differing)}"
    changed = [r.name for r in norms if r in failed]
    return (
        f"{len(changed)} of {len(norms)} norms differ, which no quantizer touches: {_some(changed)}"
        if changed
        else None
    )


def _some(found: list[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def badness(row: Row) -> tuple[bool, bool, float]:
    """Sorts the worst first: what cannot be compared, then by SQNR, equal tensors last."""
    return (
        row.state == "same",
        row.sqnr_db is not None,
        row.sqnr_db if row.sqnr_db is not None else -(row.max_abs or math.inf),
    )


def line(row: Row, width: int) -> str:
    """The difference of one tensor as a line for people."""
    name, (a, b) = f"{printable(row.name):{width}}", row.types
    if row.state.startswith("only"):
        return f"{name}  {row.state}: {a or b} {list(row.shapes[0] or row.shapes[1] or ())}"
    types = f"{a if a == b else f'{a} {b}':17}"
    if row.state == "not decoded":
        return f"{name}  {types}  not the same bytes, and not decoded here"
    if row.state == "shape":
        return f"{name}  {types}  shapes {list(row.shapes[0] or ())} and {list(row.shapes[1] or ())}"
    if row.state == "same":
        return f"{name}  {types}  same"
    if row.not_finite:
        return f"{name}  {types}  {row.not_finite} weights are NaN or infinite on one side"
    relative = (
        "A is all zeros"
        if row.relative is None or row.sqnr_db is None
        else f"relative {row.relative:.2e}  {row.sqnr_db:6.1f} dB"
    )
    return f"{name}  {types}  max {row.max_abs:.2e}  {relative}"


def summary(rows: list[Row]) -> str:
    """How many tensors are what, and the worst of those that were measured."""
    counts = {
        state: sum(r.state == state for r in rows)
        for state in ("same", "different", "shape", "not decoded", "only in A", "only in B")
    }
    said = {"shape": "of another shape"}
    text = f"{len(rows)} tensors: " + ", ".join(
        f"{n} {said.get(state, state)}" for state, n in counts.items() if n or state == "same"
    )
    measured = [r for r in rows if r.sqnr_db is not None]
    if not measured:
        return text
    worst = min(measured, key=badness)
    return f"{text}; worst {worst.sqnr_db:.1f} dB: {worst.name}"


def _parser() -> Parser:
    parser = Parser("python -m refimpl.diff", __doc__)
    parser.add_argument(
        "a", metavar="A", type=Path, help="a folder or a .gguf file, the one that errors are measured by"
    )
    parser.add_argument("b", metavar="B", type=Path, help="the other")
    parser.add_argument(
        "--tensor",
        default="*",
        metavar="GLOB",
        help="only tensors of such names, Hugging Face's or GGUF's: '*.mlp.experts.*'",
    )
    parser.add_argument(
        "--worst",
        action="store_true",
        help="the worst first, when all are measured (default: in the model's order)",
    )
    parser.add_argument(
        "--min_sqnr",
        type=number(-1e9, 1e9),
        metavar="DB",
        help="tensors of at least this SQNR count as the same for the exit code",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.diff` with these arguments. Exit code 0 when all is the same (or near enough),
    else 1 with MismatchError E4060 as its line.
    """
    args = _parser().parse_args(argv)
    a, b = Checkpoint.open(args.a, args.b), Checkpoint.open(args.b, args.a)
    for side in (a, b):
        if side.mtp:
            print(
                f"refimpl: note: {side.folder}: multi-token-prediction layer "
                f"{', '.join(map(str, side.mtp))} is not compared",
                file=sys.stderr,
            )
    width = max((len(n) for n in tensors(a) | tensors(b) if fnmatch.fnmatchcase(n, args.tensor)), default=0)
    rows: list[Row] = []
    for row in compare(a, b, args.tensor):
        rows.append(row)
        if not (args.json or args.worst):
            print(line(row, width), flush=True)
    if not rows:
        raise refusal("E4050 pattern", args.a, tensor=args.tensor, found=f"{len(tensors(a))} others")
    if args.worst:
        rows.sort(key=badness)
    failed = [r for r in rows if not passes(r, args.min_sqnr)]
    others = other_models(
        a, b, [r for r in rows if r.name.endswith("norm.weight") and r.max_abs is not None], failed
    )
    if args.json:
        report = {
            "a": str(args.a),
            "b": str(args.b),
            "kinds": [a.kind, b.kind],
            "other_models": others,
            "tensors": [r.as_dict() for r in rows],
        }
        print(to_json(report))
    else:
        print("\n".join([*([line(r, width) for r in rows] if args.worst else []), summary(rows)]))
    if not failed and others is None:
        return 0
    sys.stdout.flush()
    expected = "equal weights" if args.min_sqnr is None else f"at least {args.min_sqnr:g} dB"
    what = f"not the weights of {args.a}" if others is None else f"another model than {args.a}: {others}"
    raise refusal(
        "E4060",
        args.b,
        what=what,
        found=f"{len(failed)} of {len(rows)} tensors that differ",
        expected=expected,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
