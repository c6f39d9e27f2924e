"""What a merge will write, from the headers of both inputs alone: the plan that `merge_write` carries out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refimpl import formats
from refimpl.checkpoint import compressed, gguf, names, safetensors
from refimpl.checkpoint.folder import FORMAT_VERSION, SHAPE, VERSION, check_architecture, read_config
from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal
from refimpl.files import chunks, regular_size
from refimpl.merge import same_model, sglang_kt
from refimpl.tensors import TensorInfo

MANIFEST = "refimpl-manifest.json"
STAGE_LAYOUT = 2
# Small files that make the folder complete; config.json must be there, the others are copied where they are.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of further ones, by name
MAX_COMPANION = 128 << 20  # bytes, as much as chat takes for a tokenizer.json


class Item(NamedTuple):
    """One tensor of the output: bytes copied from `sources` one after the other, or the eight bytes of
    `value`.
    """

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
    metadata: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(i.nbytes for i in self.items)


class MergePlan(NamedTuple):
    """What a merge will write, from headers alone."""

    shards: tuple[Shard, ...]
    companions: tuple[Path, ...]
    skipped_layers: tuple[int, ...]  # of the multi-token-prediction part
    types: dict[str, int]  # bytes of routed experts by GGML type
    links: tuple[
        Path, ...
    ] = ()  # GGUF files that hold the experts, where these are referred to and not copied
    layout: str = "hybrid"

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.shards)

    @property
    def tensors(self) -> int:
        return sum(len(s.items) for s in self.shards)

    @property
    def home(self) -> Path:
        """Where the safetensors, their index and the companions go, relative to the output."""
        return Path(sglang_kt.MODEL) if self.layout == sglang_kt.LAYOUT else Path()

    def placed(self, companion: Path) -> Path:
        """Where a companion goes in the output, relative to it."""
        inner = companion.parent.name == TEMPLATES
        return self.home / (Path(TEMPLATES, companion.name) if inner else Path(companion.name))

    def fingerprint(self) -> str:
        """Changes when a source file, the layout of the output or that of the folder it is made in does."""
        paths = sorted(
            {s.path for shard in self.shards for i in shard.items for s in i.sources} | set(self.links)
        )
        stats = [(str(p.resolve()), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
        layout = [
            (s.file, s.metadata, [(i.name, i.dtype, i.shape, i.value) for i in s.items]) for s in self.shards
        ]
        return hashlib.sha256(json.dumps([STAGE_LAYOUT, stats, len(self.links), layout]).encode()).hexdigest()


# --- planning -----------------------------------------------------------------------------------------------


def plan(
    safetensor_path: Path,
    gguf_path: Path,
    *,
    linked: bool = False,
    allow_mismatch: bool = False,
    layout: str = "hybrid",
) -> MergePlan:
    """Read the headers of both inputs, check them against each other and against config.json, and lay out the
    output. Writes nothing.

    `linked` leaves the routed experts in the GGUF; `allow_mismatch` spares the look at the values that both
    inputs have (E3106). Where the checkpoint has an index, files that hold nothing but routed experts are not
    opened and need not be there. MismatchError E3101 already merged, E3102 paths swapped, E3103 no experts in
    the GGUF for a layer, E3104 shapes disagree, E3105 a tensor is missing from the checkpoint, E3106 the
    inputs are two models; beside what the readers raise. With `layout` "sglang-kt" tensors keep the names of
    the checkpoint and the experts stay GGUF (merge/sglang_kt.py); UnsupportedError E3107, E3108 where
    kt-kernel could not read them.
    """
    folder, model = _as_folder(safetensor_path), Path(gguf_path)
    _check_kind(folder, model)
    config = DeepSeekConfig.from_dict(read_config(folder), where=folder / "config.json")
    if pair := layout == sglang_kt.LAYOUT:
        sglang_kt.check_columns(config, folder / "config.json")
    skipped: set[int] = set()
    plain, _ = safetensors.read_folder(folder, wanted=lambda name: is_copied(name, config, skipped))
    file = gguf.read_all(model)
    file = file._replace(tensors=gguf.unfused(file.tensors))
    check_architecture(file)
    _check_plain(plain, config, folder)
    if not allow_mismatch:
        same_model.require_same_model(plain, file)
    groups: dict[int, list[Item]] = {i: [] for i in range(-1, config.num_hidden_layers)}
    for name, info in plain.items():
        layer = names.layer_of(name)
        groups[-1 if layer is None else layer].append(
            Item(name if pair else names.to_gguf(name), info.dtype, info.shape, (info,))
        )
    shapes: dict[int, dict[str, str]] = {i: {} for i in groups}
    types: dict[str, int] = {}
    links: set[Path] = set()
    stacks: dict[int, list[Item]] = {}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        for stack, shape, sources in _expert_stacks(file, config, layer):
            types[sources[0].dtype] = types.get(sources[0].dtype, 0) + sum(s.nbytes for s in sources)
            if linked:
                if pair and len(sources) > 1:
                    raise refusal("E3108", sources[0].path)
                links |= {s.path for s in sources}
                continue
            if pair:
                stacks.setdefault(layer, []).append(Item(stack, sources[0].dtype, shape, sources))
                continue
            blob = Item(stack, "U8", (sum(s.nbytes for s in sources),), sources)
            kind = Item(
                stack.removesuffix(".weight") + ".ggml_type", "I64", (), (), formats.type_id(sources[0].dtype)
            )
            groups[layer] += [blob, kind]
            shapes[layer][stack + SHAPE] = ",".join(map(str, shape))
    last = config.num_hidden_layers
    home = f"{sglang_kt.MODEL}/" if pair else ""
    head = {"format": "pt"} if pair else {"format": "pt", VERSION: FORMAT_VERSION}
    shards = tuple(
        Shard(f"{home}model-{i + 1:05d}-of-{last:05d}.safetensors", tuple(items), head | shapes[i])
        for i, items in sorted(groups.items())
    )
    shards += tuple(
        Shard(f"{sglang_kt.KT}/experts-{i:05d}.gguf", tuple(items), sglang_kt.metadata(config))
        for i, items in stacks.items()
    )
    named = sorted((folder / TEMPLATES).glob("*.jinja"))
    companions = tuple(path for path in (*(folder / f for f in COMPANIONS), *named) if path.exists())
    for path in companions:
        _check_small(path)
    return MergePlan(shards, companions, tuple(sorted(skipped)), types, tuple(sorted(links)), layout)


def _check_small(path: Path) -> None:
    """A pipe would be waited for, and what is no file of a model is not copied. Raises as `read_small`."""
    if (found := regular_size(path)) > MAX_COMPANION:
        raise refusal("E5004", path, found=f"{found} bytes", expected=f"at most {MAX_COMPANION}")


def is_copied(name: str, config: DeepSeekConfig, skipped: set[int]) -> bool:
    """Whether a tensor of the checkpoint goes into the folder; numbers of layers beyond the config's, which
    do not, are added to `skipped`.
    """
    layer = names.layer_of(name)
    if layer is not None and layer >= config.num_hidden_layers:
        skipped.add(layer)
        return False
    return not names.is_routed_expert(name) and not names.is_derived(name)


def _as_folder(path: Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise refusal("E4021 hub", path)
    return path if path.is_dir() else path.parent


def _check_kind(folder: Path, model: Path) -> None:
    """The usual mix-ups, by a look at the folders."""
    if not model.exists():
        raise refusal("E4021", model)
    has_gguf = (
        gguf.home(model) is not None if model.is_dir() else model.suffix == ".gguf" or gguf.is_gguf(model)
    )
    if (not any(folder.glob("*.safetensors")) and not (folder / safetensors.INDEX).exists()) or not has_gguf:
        if any(folder.glob("*.gguf")) and not has_gguf:
            raise refusal("E3102 none", folder)
        if not has_gguf:
            what = (
                "holds safetensors and no GGUF file"
                if model.is_dir() and any(model.glob("*.safetensors"))
                else "holds no GGUF file"
            )
            raise refusal("E3102 files", model, what=what)
        if any(folder.glob("*.gguf")):
            raise refusal("E3102 only", folder)
    if (folder / MANIFEST).exists() or _has_blobs(folder):
        raise refusal("E3101", folder)


def _has_blobs(folder: Path) -> bool:
    if (folder / safetensors.INDEX).exists():
        return any(names.is_gguf(name) for name in safetensors.read_index(folder))
    first = min(folder.glob("*.safetensors"), default=None)
    return first is not None and any(names.is_gguf(name) for name in safetensors.read(first).tensors)


def _check_plain(tensors: dict[str, TensorInfo], config: DeepSeekConfig, folder: Path) -> None:
    """Every tensor that is no routed expert: there, of the shape the config says, FP8 with its scales."""
    expected = {n: s for n, s in names.shapes(config).items() if not names.is_routed_expert(n)}
    for name, shape in expected.items():
        info = tensors.get(name)
        if packed := tensors.get(name.removesuffix(".weight") + compressed.PACKED):
            raise refusal("E3109", packed.path, name=packed.name, found="INT4 of compressed-tensors")
        if info is None:
            raise refusal("E3105", folder, name=name)
        if info.shape != shape:
            raise refusal("E3104", info.path, name=name, found=list(info.shape), expected=list(shape))
        if info.dtype == "F8_E4M3":
            tiles, scale = tuple(-(-n // 128) for n in shape), tensors.get(name + "_scale_inv")
            if scale is None:
                raise refusal("E4013", info.path, name=name)
            if (scale.dtype, scale.shape) != ("F32", tiles):
                found = f"{scale.dtype} {list(scale.shape)}"
                raise refusal(
                    "E4014", scale.path, name=scale.name, found=found, expected=f"F32 {list(tiles)}"
                )
        elif info.dtype not in ("BF16", "F16", "F32"):
            raise refusal(
                "E4012 scale", info.path, name=name, found=info.dtype, expected="F8_E4M3, BF16, F16 or F32"
            )


def _expert_stacks(
    file: gguf.File, config: DeepSeekConfig, layer: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[TensorInfo, ...]]]:
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
            raise refusal(
                "E3103",
                file.path,
                stack=stack,
                expected=f"experts of layers {config.first_k_dense_replace} to "
                f"{config.num_hidden_layers - 1}",
            )
        if found != (count, *matrix):
            raise refusal("E3104", file.path, name=stack, found=list(found), expected=[count, *matrix])
        formats.get(sources[0].dtype, f"{file.path}: {stack}")  # what nothing here could decode is not copied
        if len({s.dtype for s in sources}) > 1 or len({s.shape for s in sources}) > 1:
            raise refusal("E3104 different", file.path, stack=stack)
        yield stack, (count, *matrix), sources
