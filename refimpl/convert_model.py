"""Merge an FP8 checkpoint and a GGUF into one hybrid folder.

    python -m refimpl.convert_model --safetensor_path DIR --gguf_path DIR --output_path DIR

Attention, dense MLP, shared experts, router, norms and embeddings come from the safetensors as they are; the routed experts come from the GGUF as
they are. Bytes are copied, nothing is decoded. The folder is KTransformers' (GGUF names, a file per layer, flat U8 blobs with a `.ggml_type` beside
each) and carries what that lacks: shapes, an index, the config, the tokenizer, a manifest with a checksum per tensor. See docs/hybrid-folder.md.

The files are made in a folder beside the output, which is renamed when all is there; an interrupted merge goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from refimpl import formats, gguf, hybrid, names, safetensors
from refimpl.cli import Parser, Progress, run, size
from refimpl.config import DeepSeekConfig
from refimpl.errors import InputFormatError, MismatchError, RefimplError, ResourceError, printable
from refimpl.files import chunks, read_small, write_text
from refimpl.tensors import TensorInfo

MANIFEST = "refimpl-manifest.json"
# Small files that make the folder complete; config.json must be there, the others are copied where they are.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
HINT_SHAPES = "the two inputs are of different models, or config.json is"


class Item(NamedTuple):
    """One tensor of the output: bytes copied from `sources` one after the other, or the eight bytes of `value`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[TensorInfo, ...]
    value: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.sources) if self.value is None else 8

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes in bounded pieces."""
        if self.value is not None:
            yield self.value.to_bytes(8, "little")
        for source in self.sources:
            yield from chunks(source.path, source.offset, source.nbytes)


class Shard(NamedTuple):
    """One file of the output."""

    file: str
    items: tuple[Item, ...]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(i.nbytes for i in self.items)


class Plan(NamedTuple):
    """What a merge will write, from headers alone."""

    shards: tuple[Shard, ...]
    companions: tuple[Path, ...]
    skipped_layers: tuple[int, ...]  # of the multi-token-prediction part
    types: dict[str, int]  # bytes of routed experts by GGML type

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.shards)

    @property
    def tensors(self) -> int:
        return sum(len(s.items) for s in self.shards)

    def fingerprint(self) -> str:
        """Changes when a source file or the layout of the output does."""
        paths = sorted({s.path for shard in self.shards for i in shard.items for s in i.sources})
        stats = [(str(p.resolve()), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
        layout = [(s.file, s.metadata, [(i.name, i.dtype, i.shape, i.value) for i in s.items]) for s in self.shards]
        return hashlib.sha256(json.dumps([stats, layout]).encode()).hexdigest()


# --- planning ---------------------------------------------------------------------------------------------------------------------------------


def plan(safetensor_path: Path, gguf_path: Path) -> Plan:
    """Read the headers of both inputs, check them against each other and against config.json, and lay out the output. Writes nothing.

    MismatchError E3101 already merged, E3102 paths swapped, E3103 no experts in the GGUF for a layer, E3104 shapes disagree, E3105 a tensor is
    missing from the checkpoint; beside what the readers raise.
    """
    folder, model = _as_folder(safetensor_path), Path(gguf_path)
    _check_kind(folder, model)
    config = DeepSeekConfig.from_dict(hybrid.read_config(folder), where=folder / "config.json")
    tensors, _ = safetensors.read_folder(folder, wanted=lambda name: not names.is_routed_expert(name))
    file = gguf.read_all(model)
    hybrid.check_architecture(file)
    skipped = tuple(sorted({n for name in tensors if (n := names.layer_of(name)) is not None and n >= config.num_hidden_layers}))
    plain = {name: info for name, info in tensors.items() if (names.layer_of(name) or 0) < config.num_hidden_layers}
    _check_plain(plain, config, folder)
    groups: dict[int, list[Item]] = {i: [] for i in range(-1, config.num_hidden_layers)}
    for name, info in plain.items():
        layer = names.layer_of(name)
        groups[-1 if layer is None else layer].append(Item(names.to_gguf(name), info.dtype, info.shape, (info,)))
    shapes: dict[int, dict[str, str]] = {i: {} for i in groups}
    types: dict[str, int] = {}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        for stack, shape, sources in _expert_stacks(file, config, layer):
            blob = Item(stack, "U8", (sum(s.nbytes for s in sources),), sources)
            kind = Item(stack.removesuffix(".weight") + ".ggml_type", "I64", (), (), formats.type_id(sources[0].dtype))
            groups[layer] += [blob, kind]
            shapes[layer][stack + hybrid.SHAPE] = ",".join(map(str, shape))
            types[sources[0].dtype] = types.get(sources[0].dtype, 0) + blob.nbytes
    last = config.num_hidden_layers
    shards = tuple(
        Shard(
            f"model-{i + 1:05d}-of-{last:05d}.safetensors",
            tuple(items),
            {"format": "pt", hybrid.VERSION: hybrid.FORMAT_VERSION} | shapes[i],
        )
        for i, items in sorted(groups.items())
    )
    return Plan(shards, tuple(folder / f for f in COMPANIONS if (folder / f).exists()), skipped, types)


def _as_folder(path: Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise MismatchError("E4021", path, "no such folder", hint="check the path")
    return path if path.is_dir() else path.parent


def _check_kind(folder: Path, model: Path) -> None:
    """The usual mix-ups, by a look at the folders."""
    if not model.exists():
        raise MismatchError("E4021", model, "no such folder", hint="check the path")
    has_gguf = model.suffix == ".gguf" or (model.is_dir() and any(model.glob("*.gguf")))
    if (not any(folder.glob("*.safetensors")) and not (folder / safetensors.INDEX).exists()) or not has_gguf:
        if any(folder.glob("*.gguf")) and not has_gguf:
            raise MismatchError("E3102", folder, "--safetensor_path holds GGUF files and --gguf_path none", hint="swap the two paths")
        if not has_gguf:
            what = "holds safetensors and no GGUF file" if model.is_dir() and any(model.glob("*.safetensors")) else "holds no GGUF file"
            raise MismatchError("E3102", model, f"--gguf_path {what}", hint="pass the folder with the Q4_K_M .gguf files")
        if any(folder.glob("*.gguf")):
            raise MismatchError("E3102", folder, "--safetensor_path holds GGUF files only", hint="pass the folder of the FP8 checkpoint")
    if (folder / MANIFEST).exists() or _has_blobs(folder):
        hint = "pass the original FP8 checkpoint; to chat with this one, give it as --gguf_path to refimpl.chat"
        raise MismatchError("E3101", folder, "--safetensor_path is already merged (names blk.*, .ggml_type)", hint=hint)


def _has_blobs(folder: Path) -> bool:
    first = min(folder.glob("*.safetensors"), default=None)
    return first is not None and any(names.is_gguf(name) for name in safetensors.read(first).tensors)


def _check_plain(tensors: dict[str, TensorInfo], config: DeepSeekConfig, folder: Path) -> None:
    """Every tensor that is no routed expert: there, of the shape the config says, FP8 with its scales."""
    expected = {n: s for n, s in names.shapes(config).items() if not names.is_routed_expert(n)}
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None:
            raise MismatchError(
                "E3105", folder, f"tensor {name} is missing", hint="the checkpoint is incomplete or its config.json is another model's"
            )
        if info.shape != shape:
            raise MismatchError(
                "E3104",
                info.path,
                f"{name} has another shape than config.json says",
                found=list(info.shape),
                expected=list(shape),
                hint=HINT_SHAPES,
            )
        if info.dtype == "F8_E4M3":
            tiles, scale = tuple(-(-n // 128) for n in shape), tensors.get(name + "_scale_inv")
            if scale is None:
                raise MismatchError(
                    "E4013",
                    info.path,
                    f"{name}_scale_inv is missing",
                    hint="the FP8 codes mean nothing without it: get the whole checkpoint",
                )
            if (scale.dtype, scale.shape) != ("F32", tiles):
                found = f"{scale.dtype} {list(scale.shape)}"
                raise MismatchError(
                    "E4014",
                    scale.path,
                    f"{scale.name} does not fit its weight",
                    found=found,
                    expected=f"F32 {list(tiles)}",
                    hint="blocks are 128x128",
                )
        elif info.dtype not in ("BF16", "F16", "F32"):
            raise MismatchError("E4012", info.path, f"{name} has a dtype that no weight has", found=info.dtype, expected="F8_E4M3, BF16, F16 or F32")


def _expert_stacks(file: gguf.File, config: DeepSeekConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...], tuple[TensorInfo, ...]]]:
    """(name, shape, sources) of a layer's three stacks; old files hold each expert by itself."""
    count, wide, narrow = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    for part, matrix in (("gate", (narrow, wide)), ("up", (narrow, wide)), ("down", (wide, narrow))):
        stack = f"blk.{layer}.ffn_{part}_exps.weight"
        if stack in file.tensors:
            sources: tuple[TensorInfo, ...] = (file.tensors[stack],)
            found = sources[0].shape
        else:
            singles = [file.tensors.get(f"blk.{layer}.ffn_{part}.{e}.weight") for e in range(count)]
            sources = tuple(s for s in singles if s is not None)
            found = (len(sources), *sources[0].shape) if sources else ()
        if not sources:
            hint = "the GGUF is incomplete (a part of a split file?) or of another model"
            raise MismatchError(
                "E3103",
                file.path,
                f"{stack} is missing",
                expected=f"experts of layers {config.first_k_dense_replace} to {config.num_hidden_layers - 1}",
                hint=hint,
            )
        if found != (count, *matrix):
            raise MismatchError(
                "E3104",
                file.path,
                f"{stack} has another shape than config.json says",
                found=list(found),
                expected=[count, *matrix],
                hint=HINT_SHAPES,
            )
        if len({s.dtype for s in sources}) > 1 or len({s.shape for s in sources}) > 1:
            raise MismatchError(
                "E3104",
                file.path,
                f"the experts of {stack} are of different types",
                hint="convert the model again with a current llama.cpp",
            )
        yield stack, (count, *matrix), sources


# --- writing ----------------------------------------------------------------------------------------------------------------------------------


def write(p: Plan, output: Path, progress: Callable[[int], None] = lambda n: None) -> None:
    """Carry out a plan; `output` appears complete or not at all. `progress(n)` is told of every n bytes, those of an earlier try included.

    ResourceError: E5101 the output exists, E5102 not enough room, E5103 another merge is writing it.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.with_name(f".{output.name}.merging")
    with _Lock(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ResourceError("E5101", output, "the output exists and is not empty", hint="choose another --output_path or remove it")
        _prepare(stage, p)
        for shard in p.shards:
            _write_shard(shard, stage, progress)
        _finish(p, stage)
        if output.exists():
            output.rmdir()
        os.rename(stage, output)


class _Lock:
    """One merge at a time to one output; the lock dies with its process."""

    def __init__(self, output: Path):
        self.output, self.path = output, output.with_name(f".{output.name}.lock")

    def __enter__(self) -> None:
        self.file = open(self.path, "w")
        if not _locked(self.file) or not self.path.exists() or os.stat(self.path).st_ino != os.fstat(self.file.fileno()).st_ino:
            # Held by another process, or by one that has finished and removed it since we opened it.
            self.file.close()
            raise ResourceError("E5103", self.output, "another merge is writing this folder", hint="wait for it, or choose another --output_path")

    def __exit__(self, *exc: object) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()


def _locked(file: IO) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return True
    except OSError:
        return False
    return True


def _prepare(stage: Path, p: Plan) -> None:
    """An empty staging folder, or that of an earlier try at the very same merge with its finished files."""
    ticket, fingerprint = stage / "plan", p.fingerprint()
    if stage.exists() and not (ticket.exists() and ticket.read_text() == fingerprint):
        shutil.rmtree(stage)
    done = sum(f.stat().st_size for f in stage.glob("*.safetensors")) if stage.exists() else 0
    free = shutil.disk_usage(stage.parent).free
    needed = p.nbytes - done + (16 << 20)
    if needed > free:
        raise ResourceError(
            "E5102",
            stage.parent,
            "not enough room on this disk",
            found=f"{size(free)} free",
            expected=size(needed),
            hint="free some, or choose another --output_path",
        )
    stage.mkdir(exist_ok=True)
    for orphan in stage.glob(".*.part"):
        orphan.unlink()
    write_text(ticket, fingerprint)


def _write_shard(shard: Shard, stage: Path, progress: Callable[[int], None]) -> None:
    path, sums = stage / shard.file, stage / (shard.file + ".sums")
    if path.exists() and sums.exists():
        progress(shard.nbytes)
        return
    found: dict[str, str] = {}

    def pieces(item: Item) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for piece in item.pieces():
            digest.update(piece)
            yield piece
        found[item.name] = digest.hexdigest()

    entries = [safetensors.Entry(i.name, i.dtype, i.shape, lambda i=i: pieces(i)) for i in shard.items]  # type: ignore[misc]
    safetensors.write(path, entries, shard.metadata, progress)
    write_text(sums, json.dumps(found))


def _finish(p: Plan, stage: Path) -> None:
    """Companion files, index and manifest; then the stage holds nothing but the result."""
    for path in p.companions:
        shutil.copyfile(path, stage / path.name)
    checksums: dict[str, str] = {}
    for shard in p.shards:
        sums = stage / (shard.file + ".sums")
        checksums |= json.loads(sums.read_text())
        sums.unlink()
    weight_map = {i.name: s.file for s in p.shards for i in s.items}
    write_text(stage / safetensors.INDEX, json.dumps({"metadata": {"total_size": p.nbytes}, "weight_map": weight_map}, indent=1) + "\n")
    manifest = {"format_version": hybrid.FORMAT_VERSION, "tensors": len(checksums), "nbytes": p.nbytes, "sha256": checksums}
    write_text(stage / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (stage / "plan").unlink()


def verify(folder: Path, progress: Callable[[int], None] = lambda n: None) -> int:
    """Recompute every tensor's SHA-256 and compare with the manifest; returns the number of tensors.

    MismatchError E3201 for a tensor that is missing or has other bytes, InputFormatError E3202 for a manifest that is missing or malformed.
    """
    path = Path(folder) / MANIFEST
    try:
        wanted = json.loads(read_small(path, safetensors.MAX_INDEX))["sha256"]
        wanted = dict(wanted)
    except (OSError, RefimplError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputFormatError(
            "E3202", path, "no usable manifest", found=type(error).__name__, hint="only folders merged by refimpl have one"
        ) from None
    tensors, _ = safetensors.read_folder(Path(folder))
    for name in sorted(wanted.keys() | tensors.keys()):
        digest = hashlib.sha256()
        for piece in chunks(tensors[name].path, tensors[name].offset, tensors[name].nbytes) if name in tensors else ():
            digest.update(piece)
            progress(len(piece))
        if name not in tensors or digest.hexdigest() != wanted.get(name):
            raise MismatchError("E3201", folder, f"tensor {name} is not what was merged", expected=f"sha256 {wanted.get(name)}", hint="merge again")
    return len(wanted)


# --- the command ------------------------------------------------------------------------------------------------------------------------------


def describe(p: Plan) -> dict[str, Any]:
    """The plan as `--json` prints it."""
    return {
        "files": [{"file": s.file, "tensors": len(s.items), "nbytes": s.nbytes} for s in p.shards],
        "tensors": p.tensors,
        "nbytes": p.nbytes,
        "expert_bytes": p.types,
        "companions": [c.name for c in p.companions],
        "skipped_mtp_layers": list(p.skipped_layers),
    }


def _show(p: Plan) -> None:
    experts = ", ".join(f"{size(n)} as {kind}" for kind, n in sorted(p.types.items()))
    print(f"{p.tensors} tensors, {size(p.nbytes)}, in {len(p.shards)} files; routed experts: {experts}", file=sys.stderr)
    if p.skipped_layers:
        print(
            f"skipped: multi-token-prediction layer {', '.join(map(str, p.skipped_layers))} (beyond num_hidden_layers, not used for chat)",
            file=sys.stderr,
        )


def main(argv: list[str]) -> int | None:
    """The command."""
    parser = Parser(prog="python -m refimpl.convert_model", description=__doc__)
    parser.add_argument("--safetensor_path", type=Path, help="folder of the FP8 checkpoint (safetensors, config.json, tokenizer)")
    parser.add_argument("--gguf_path", type=Path, help="folder of the GGUF, or a .gguf file; any part of a split one")
    parser.add_argument("--output_path", type=Path, required=True, help="the hybrid folder to make")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument(
        "--verify", action="store_true", help="check the checksums of the output; without the other two paths, of a folder made before"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    if not (args.safetensor_path and args.gguf_path) and not (args.verify and not args.safetensor_path and not args.gguf_path):
        parser.error("--safetensor_path and --gguf_path are needed (or --verify alone with --output_path)")
    report: dict[str, Any] = {"output_path": str(args.output_path)}
    if args.safetensor_path:
        p = plan(args.safetensor_path, args.gguf_path)
        report |= describe(p)
        _show(p)
        if args.dry_run:
            for shard in p.shards:
                print(f"  {shard.file}  {len(shard.items):3} tensors  {size(shard.nbytes):>9}", file=sys.stderr)
        else:
            with Progress(p.nbytes, "merging") as progress:
                write(p, args.output_path, progress)
            print(f"wrote {printable(str(args.output_path), 4096)}", file=sys.stderr)
    if args.verify and not args.dry_run:
        total = sum(t.nbytes for t in safetensors.read_folder(args.output_path)[0].values()) if args.output_path.exists() else 0
        with Progress(total, "verifying") as progress:
            report["verified"] = verify(args.output_path, progress)
        print(f"verified {report['verified']} tensors", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
