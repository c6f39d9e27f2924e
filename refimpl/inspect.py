"""Look inside a model: `python -m refimpl.inspect PATH` lists the tensors of a folder or file (safetensors,
GGUF, hybrid), with `TENSOR` it tells one tensor's facts, and with `--block N` (and `--bits`) it draws one
block: every field, its bits, the numbers they make. `--html FILE` writes that block and those after it as a
page whose bits can be flipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats
from refimpl.checkpoint import gguf, link, names, safetensors
from refimpl.checkpoint.folder import SHAPE
from refimpl.cli import Parser, integer, run, size, to_json
from refimpl.errors import MismatchError, RefimplError, near, printable, refusal
from refimpl.fields import note
from refimpl.files import check_writable, window, write_text
from refimpl.formats import bf16, draw, e4m3, e5m2, e8m0, f16, f32
from refimpl.pages import block as block_page
from refimpl.pages import layouts
from refimpl.tensors import TensorInfo

TILE = 128
CORNER = 8  # of a tile of 128x128 codes, this many rows and columns are shown
FP8 = {"F8_E4M3": ("e4m3", e4m3), "F8_E5M2": ("e5m2", e5m2), "F8_E8M0": ("e8m0", e8m0)}
FLOATS = {"BF16": ("bf16", bf16), "F16": ("f16", f16), "F32": ("f32", f32)}
RUN = 32  # plain numbers shown as one block


class Tensor(NamedTuple):
    """One tensor as listed: a TensorInfo, its type by name (a hybrid folder's blob has the GGML type of its
    stack) and its shape if known.
    """

    info: TensorInfo
    type: str
    shape: tuple[int, ...] | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.info.name,
            "type": self.type,
            "shape": self.shape,
            "nbytes": self.info.nbytes,
            "file": self.info.path.name,
        } | {"offset": self.info.offset}


class Headers(NamedTuple):
    """What the headers at a path say."""

    path: Path
    kind: str  # "safetensors", "gguf" or "hybrid"
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_headers(path: Path) -> Headers:
    """Headers of a folder or of one file; needs no config.json, and DeepSeek's names neither.

    MismatchError E4021 for a path with nothing to see, otherwise what the readers raise.
    """
    if not path.exists():
        raise refusal("E4021 file", path)
    if path.suffix == ".safetensors" and path.is_file():
        header = safetensors.read(path)
        return _safetensors(path, header.tensors, header.metadata)
    if path.is_dir() and (any(path.glob("*.safetensors")) or (path / safetensors.INDEX).exists()):
        model = _safetensors(path, *safetensors.read_folder(path))
        linked = {name: Tensor(info, info.dtype, info.shape) for name, info in link.read(path).items()}
        return model._replace(kind="hybrid" if linked else model.kind, tensors=model.tensors | linked)
    if path.is_dir() and gguf.home(path) is None:
        raise refusal("E4021 safetensors", path, hint=safetensors.what_else(path))
    file = _gguf(path)
    return Headers(
        path,
        "gguf",
        file.metadata,
        {name: Tensor(info, info.dtype, info.shape) for name, info in file.tensors.items()},
    )


def _gguf(path: Path) -> gguf.File:
    """A model in GGUF; of a split one whose other parts are not there the file that was named, with a
    note.
    """
    try:
        return gguf.read_all(path)
    except MismatchError as error:
        if not path.is_file() or error.code not in ("E1201", "E1202"):
            raise
        if gguf.read(path).metadata.get("split.count", 1) == 1:  # its name alone speaks of parts
            raise
        note(f"only this file is shown: {error.line()}")
        return gguf.read(path)


def _safetensors(path: Path, infos: dict[str, TensorInfo], metadata: dict[str, str]) -> Headers:
    tensors = {}
    for name, info in infos.items():
        kind = infos.get(name.removesuffix(".weight") + ".ggml_type") if info.dtype == "U8" else None
        if kind is None:
            tensors[name] = Tensor(info, info.dtype, info.shape)
        else:
            shape = metadata.get(name + SHAPE, "")
            known = re.fullmatch(r"\d{1,9}(,\d{1,9}){0,3}", shape) is not None
            tensors[name] = Tensor(
                info,
                formats.type_name(int(_bytes(kind).view(np.int64)[0])),
                tuple(map(int, shape.split(","))) if known else None,
            )
    return Headers(
        path,
        "hybrid" if any(n.endswith(".ggml_type") for n in infos) else "safetensors",
        dict(metadata),
        tensors,
    )


def _bytes(info: TensorInfo) -> np.ndarray:
    return window(info.path, info.offset, info.nbytes)


def find(model: Headers, name: str) -> Tensor:
    """A tensor by its name in the file, or by its name in the other naming. MismatchError E4050 with the
    nearest names.
    """
    if name in model.tensors:
        return model.tensors[name]
    for translate in (names.to_gguf, names.to_hf):
        try:
            return model.tensors[translate(name)]
        except (RefimplError, KeyError):
            pass
    close = near(name, model.tensors, 3, 0.5)
    hint = f"near: {', '.join(close)}" if close else "leave the name away for a list"
    raise refusal("E4050", model.path, name=name, found=f"{len(model.tensors)} others", hint=hint)


# --- one block ----------------------------------------------------------------------------------------------


def blocks(tensor: Tensor) -> int:
    """How many blocks `--block` can draw: GGML blocks, tiles of 128x128 for FP8 matrices, runs of 32 for
    plain numbers.
    """
    if tensor.type in FP8 and len(tensor.info.shape) == 2:
        return math.prod(-(-n // TILE) for n in tensor.info.shape)
    module = _ggml(tensor)
    unit = module.BLOCK.itemsize if module else RUN * _itemsize(tensor)
    return -(-tensor.info.nbytes // unit)


def _ggml(tensor: Tensor) -> Any:
    known = {m.NAME: m for m in formats.FORMATS.values() if hasattr(m, "PARTS")}
    return known.get(tensor.type)


def _itemsize(tensor: Tensor) -> int:
    return tensor.info.nbytes // max(math.prod(tensor.info.shape), 1) or 1


def draw_block(model: Headers, tensor: Tensor, n: int, bits: bool) -> tuple[dict[str, Any], list[str]]:
    """Block n as a dict for JSON and as lines of text. MismatchError E4051 for a block that is not there,
    UnsupportedError E4052 for other types.
    """
    count = blocks(tensor)
    if not 0 <= n < count:
        raise refusal(
            "E4051", tensor.info.name, found=n, expected=f"0 to {count - 1}" if count else "none: it is empty"
        )
    module = _ggml(tensor)
    if module:
        block = np.array(_bytes(tensor.info)[n * module.BLOCK.itemsize : (n + 1) * module.BLOCK.itemsize])
        place = _place(tensor.shape, n * module.WEIGHTS, module.WEIGHTS)
        return {"place": place, **draw.as_dict(module, block, bits)}, [
            f"block {n} of {count}: {place}",
            "",
            *draw.lines(module, block, bits),
        ]
    if tensor.type in FP8 and len(tensor.info.shape) == 2:
        return _tile(model, tensor, n, bits)
    return _run(tensor, n, bits)


def _place(shape: tuple[int, ...] | None, first: int, count: int) -> str:
    if shape is None:
        return f"weights {first} to {first + count - 1} of the stack"
    *index, column = map(int, np.unravel_index(first, shape))
    return (
        f"weights {[*index]}{[column]} to {column + count - 1}"
        if index
        else f"weights {column} to {column + count - 1}"
    )


def _tile(model: Headers, tensor: Tensor, n: int, bits: bool) -> tuple[dict[str, Any], list[str]]:
    kind, module = FP8[tensor.type]
    shape = tensor.info.shape
    r, c = divmod(n, -(-shape[1] // TILE))
    codes = _bytes(tensor.info).reshape(shape)[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE]
    found = model.tensors.get(tensor.info.name + "_scale_inv")
    scale = None
    if found and found.type == "F32" and found.info.shape == tuple(-(-k // TILE) for k in shape):
        scale = _bytes(found.info).view("<f4").reshape(found.info.shape)[r, c]
    values = module.decode(codes)
    weights = values if scale is None else values * scale
    place = (
        f"rows {r * TILE} to {r * TILE + len(codes) - 1}, columns {c * TILE} to "
        f"{c * TILE + codes.shape[1] - 1}"
    )
    drawn = {
        "place": place,
        "weight_scale_inv": scale if scale is None else draw.plain(scale),
        "codes": codes.tolist(),
        "weights": draw.plain(weights),
    }
    text = [f"tile {n} of {blocks(tensor)}: {place}", ""]
    if scale is None:
        text.append("weight_scale_inv: none beside it")
    else:
        pattern = int(scale.view(np.uint32))
        text.append(
            f"weight_scale_inv[{r},{c}] f32 0x{pattern:08x}  {draw.float_bits(pattern, 'f32')}  = "
            f"{draw.number(scale)}"
        )
    corner = np.s_[:CORNER, :CORNER]
    text += ["", f"codes, the first {CORNER} rows and columns:"]
    text += [row.tobytes().hex(" ") for row in np.ascontiguousarray(codes[corner])]
    if bits:
        text += [
            "",
            "row col  code  " + "bits".ljust(len(draw.float_bits(0, kind))) + "  number      times scale",
        ]
        for (i, j), code in np.ndenumerate(codes[corner]):
            shown = f"{draw.number(values[i, j]):10}  {draw.number(weights[i, j])}"
            text.append(f"{i:3} {j:3}  0x{code:02x}  {draw.float_bits(int(code), kind)}  {shown}")
    text += ["", *draw.array_lines("w", weights[corner])]
    return drawn, text


def _run(tensor: Tensor, n: int, bits: bool) -> tuple[dict[str, Any], list[str]]:
    width = _itemsize(tensor)
    raw = np.array(_bytes(tensor.info)[n * RUN * width : (n + 1) * RUN * width])
    found = (FP8 | FLOATS).get(tensor.type)
    integer = re.fullmatch(r"([IU])(8|16|32|64)", tensor.type)
    if found:
        kind, module = found
        values = module.decode(raw) if tensor.type in FP8 else module.dequantize(raw)
    elif integer:
        kind, values = "", raw.view(f"<{integer[1].lower()}{int(integer[2]) // 8}")
    else:
        raise refusal("E4052", tensor.info.name, found=tensor.type)
    place = (
        _place(tensor.shape if tensor.shape else None, n * RUN, len(values))
        if tensor.shape
        else "the one number"
    )
    text = [
        f"numbers {n * RUN} to {n * RUN + len(values) - 1} of {math.prod(tensor.info.shape)}: {place}",
        "",
    ]
    patterns = raw.view(f"<u{width}")
    for pattern, value in zip(patterns.tolist(), values):
        shown = (
            f"  {draw.float_bits(pattern, kind)}"
            if bits and kind
            else f"  {pattern:0{8 * width}b}"
            if bits
            else ""
        )
        text.append(f"0x{pattern:0{2 * width}x}{shown}  = {draw.number(value)}")
    return {"place": place, "bytes": raw.tobytes().hex(), "weights": draw.plain(values)}, text


PAGE_BYTES = 1 << 20  # of a tensor in one page, which a browser opens at once


def html_page(tensor: Tensor, first: int) -> str:
    """A page of the tensor's blocks from `first` on, as many as fit into PAGE_BYTES, whose bits can be
    flipped. Blocks of FP8 and of plain numbers are runs of 32. MismatchError E4051 and UnsupportedError E4052
    as `draw_block`.
    """
    name = layouts.known(tensor.type)
    if name is None:
        raise refusal("E4052", tensor.info.name, found=tensor.type)
    step = layouts.layout(name)["bytes"]
    count = -(-tensor.info.nbytes // step)
    if not 0 <= first < count:
        expected = f"0 to {count - 1}" if count else "none: it is empty"
        raise refusal("E4051", tensor.info.name, found=first, expected=expected)
    shown = min(count - first, PAGE_BYTES // step)
    data = _bytes(tensor.info)[first * step : (first + shown) * step].tobytes()
    title, told = f"{printable(tensor.info.name)}: {tensor.type}", escape(" ".join(facts(tensor)))
    lead = f"<p>{told}</p><p>Blocks {first} to {first + shown - 1} of {count} are in this page.</p>"
    return block_page.page(
        name, data, title=title, lead=lead, first=first, tensor=printable(tensor.info.name)
    )


# --- lists --------------------------------------------------------------------------------------------------


def listing(model: Headers) -> Iterator[str]:
    """Metadata, then a line a tensor; the experts of a stack that are stored one by one share a line."""
    files = {t.info.path for t in model.tensors.values()}
    total = sum(t.info.nbytes for t in model.tensors.values())
    path, several = printable(str(model.path), 4096), "s" * (len(files) != 1)
    yield f"{path}: {model.kind}, {len(model.tensors)} tensors in {len(files)} file{several}, {size(total)}"
    for key, value in model.metadata.items():
        if not key.endswith(SHAPE):
            yield printable(f"  {key} = {_short(value)}", 140)
    by_type: dict[str, list[int]] = {}
    for t in model.tensors.values():
        by_type.setdefault(t.type, []).append(t.info.nbytes)
    yield "  types: " + ", ".join(
        f"{kind} {size(sum(n))} in {len(n)}"
        for kind, n in sorted(by_type.items(), key=lambda kv: -sum(kv[1]))
    )
    rows: dict[tuple[str, str, Any], list[Tensor]] = {}
    for name, t in sorted(model.tensors.items(), key=lambda item: _natural(item[0])):
        stack, expert = names.split_expert(name)
        rows.setdefault(
            (stack, t.type, t.shape) if expert is not None else (name, t.type, t.shape), []
        ).append(t)
    width = min(72, max((len(name) for name, _, _ in rows), default=0))
    for (name, kind, shape), members in rows.items():
        several = f"{len(members)} experts of " if len(members) > 1 else ""
        shown = several + (str(list(shape)) if shape is not None else "shape unknown")
        total, file = sum(m.info.nbytes for m in members), printable(members[0].info.path.name)
        yield f"  {printable(name):{width}}  {kind:8} {shown:32} {size(total):>9}  {file}"


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sorts layer 2 before layer 10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", name)
    ]


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray | list | tuple):
        return (
            f"{len(value)} values: {', '.join(str(v) for v in list(value)[:4])}, ..."
            if len(value) > 4
            else str(list(value))
        )
    return str(value)


def facts(tensor: Tensor) -> Iterator[str]:
    """A tensor's type, shape and place in its file."""
    info = tensor.info
    module = _ggml(tensor)
    of = f" ({module.WEIGHTS} weights in {module.BLOCK.itemsize} bytes)" if module else ""
    yield (
        f"{printable(info.name)}: {tensor.type}{of} "
        f"{list(tensor.shape) if tensor.shape is not None else '(shape unknown)'}, {size(info.nbytes)}"
    )
    yield f"{printable(str(info.path), 4096)}: bytes {info.offset} to {info.offset + info.nbytes}"


def main(argv: list[str]) -> None:
    """The command: list, tell or draw."""
    parser = Parser("python -m refimpl.inspect", __doc__)
    parser.add_argument("path", type=Path, help="a folder or a file: safetensors, GGUF or hybrid")
    parser.add_argument("tensor", nargs="?", help="name of a tensor, as in the file or in the other naming")
    parser.add_argument(
        "--block",
        type=integer(-(2**63), 2**63 - 1),
        metavar="N",
        help="draw block N: a GGML block, a 128x128 tile of FP8, or 32 plain numbers",
    )
    parser.add_argument(
        "--bits",
        action="store_true",
        help="every bit of the block and what it belongs to (block 0 unless --block says)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page whose bits can be flipped, from block N on"
    )
    parser.add_argument("--force", action="store_true", help="replace --html's FILE if it is a file")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    block = 0 if args.bits and args.block is None else args.block
    if args.tensor is None and (block is not None or args.html):
        parser.error("--block, --bits and --html need TENSOR")
    if args.html:
        check_writable(args.html, force=args.force, inputs=[args.path])
    model = read_headers(args.path)
    if args.tensor is None:
        report: dict[str, Any] = {
            "path": str(model.path),
            "kind": model.kind,
            "metadata": {k: _json(v) for k, v in model.metadata.items()},
        }
        report["tensors"] = [t.as_dict() for t in model.tensors.values()]
        text = listing(model) if not args.json else iter(())
    else:
        tensor = find(model, args.tensor)
        report = tensor.as_dict() | {"blocks": blocks(tensor)}
        text = facts(tensor)
        if args.html:
            write_text(args.html, html_page(tensor, block or 0), force=args.force)
            report |= {"html": str(args.html)}
            text = iter([*text, f"wrote {printable(str(args.html), 4096)}"])
        elif block is None:
            text = iter([*text, f"{blocks(tensor)} blocks: --block N draws one, --bits its bits"])
        else:
            drawn, drawing = draw_block(model, tensor, block, args.bits)
            report |= {"block": block, **drawn}
            text = iter([*text, *drawing])
    print(to_json(report) if args.json else "\n".join(text))


def _json(value: Any) -> Any:
    return draw.plain(value) if isinstance(value, np.ndarray | np.generic) else value


if __name__ == "__main__":
    raise SystemExit(run(main))
