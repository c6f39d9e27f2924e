"""What a model takes of each device's memory, reckoned before anything is loaded.

Weights are counted as the cuda backend keeps them (devices/cuda.py): FP8 with its scales, BF16 and F32 as
stored, GGML blocks and `kv_b` as bfloat16, one-dimensional tensors as float32; on the CPU they stay in the
mapped file, a large `kv_b` of FP8 too, as backend "cpu" keeps it. Loading refuses what does not fit.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refimpl import formats, ops
from refimpl.cache import INITIAL_ROWS, MOST_ON_CPU, MOST_PREFILL, PREFILL, capacity
from refimpl.checkpoint import names, safetensors
from refimpl.checkpoint.codecs import fitting
from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.stored import KINDS, storage
from refimpl.cli import size
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Backend
from refimpl.devices.cpu import on_cpu_tensors, stays_coded
from refimpl.errors import meant, refusal
from refimpl.formats import int4
from refimpl.formats.ggml_types import TYPES
from refimpl.reference import fp8
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4

CONFIGS = Path(__file__).parents[1] / "configs"
ALIGN = 512  # bytes: what torch's allocator rounds up to
CONTEXT = 8192  # tokens of a conversation, unless others are asked for
SCORES = 1 << 22  # bytes of absorbed attention's scores at a time, as in kernels/attention_torch.py
EXPANDED_FROM = 17  # tokens that go through expanded keys and values, as there
EXPANDED = 1 << 26  # bytes of these at a time, up to four times that, as there
SHARES = 64  # of the cache's rows that are mixed apart for one token, at most (kernels/mla_long_triton.py)
SHARE = 256  # rows of one, at least, as there
STACKED = 1 << 22  # bytes of a product's results that are made in one go, as in kernels/linear_torch.py
LIBRARY = 2 << 25  # bytes: the two workspaces of 32 MiB that torch gives the matrix library on Hopper
COUNTERS = 4 << 20  # bytes: those of the FP8 linear that splits columns (kernels/fp8_linear_triton.py)
PER_EXPERT = 32  # tokens of a prompt: two whole tiles of a CPU with AMX, and its bytes are read once for them
SPARED = 16  # what is free is so many times what a prompt's activations take on the CPU, at least
CONTEXT_BYTES = 500e6  # of the driver and its kernels; no allocation of torch's, so in no total
NOT_DECODED = {t.name for t in TYPES.values() if not t.decoded}
COMPONENTS = {"kv_b": r"self_attn\.kv_b_proj", **KINDS}  # the first that matches


# Models whose config is another's, but for names.
ALIKE = {"deepseek-r1": "deepseek-v3", "deepseek-r1-0528": "deepseek-v3", "deepseek-v3-0324": "deepseek-v3"}


def builtin_configs() -> dict[str, Path]:
    """The config.json files of this package, models in full size, by name."""
    return {p.stem: p for p in sorted(CONFIGS.glob("*.json"))}


class MemoryItem(NamedTuple):
    """A component on one device. `bytes_per_token`: bytes of it that decoding a token reads."""

    name: str
    device: str
    nbytes: int
    bytes_per_token: int = 0
    layers: tuple[int, ...] = ()
    note: str = ""

    def report(self) -> dict[str, Any]:
        """The item under the keys that `--json` promises."""
        return {
            "name": self.name,
            "device": self.device,
            "nbytes": self.nbytes,
            "touched": self.bytes_per_token,
            "layers": self.layers,
            "note": self.note,
        }


class Stored(NamedTuple):
    """A tensor of the checkpoint: its format ("E4M3", "INT4", "BF16", "F32", a GGML type) and shape."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """A config and what its tensors are stored as, by HF name."""

    config: DeepSeekConfig
    tensors: Mapping[str, Stored]
    name: str = ""

    @classmethod
    def builtin(cls, name: str) -> Inventory:
        """From the config of that name in this package, in the formats of a hybrid folder with Q4_K_M
        experts. UnsupportedError E7021 for no such.
        """
        known, lower = builtin_configs(), name.lower()
        if (path := known.get(ALIKE.get(lower, lower))) is None:
            raise refusal("E7021", name, expected=meant(name, [*known, *ALIKE]))
        config = DeepSeekConfig.from_dict(json.loads(path.read_text()), where=path.name)
        kinds = {
            n: Stored(storage(config, n, shape, "Q4_K_M")[0], shape)
            for n, shape in names.shapes(config).items()
        }
        return cls(config, kinds, name)

    @classmethod
    def open(cls, folder: Path | str, config_folder: Path | str | None = None) -> Inventory:
        """From the headers of a model's folder."""
        return cls.of(Checkpoint.open(folder, config_folder))

    @classmethod
    def of(cls, checkpoint: Any, config: DeepSeekConfig | None = None) -> Inventory:
        """From an open checkpoint, or any mapping of weights with its config. MismatchError E4011 where they
        differ in a shape.
        """
        config = config or DeepSeekConfig.from_dict(checkpoint.config, where=checkpoint.folder)
        wanted = names.shapes(config)
        joined = {
            n
            for n in wanted
            if n.endswith("kv_b_proj.weight")
            and (k := names.to_gguf(n).replace("_kv_b", "_k_b")) in checkpoint
            and k
        }
        kinds = {
            n: Stored("F32" if n in joined else _kind_of(checkpoint, g, s), s)
            for n, s in wanted.items()
            if (g := names.to_gguf(n)) in checkpoint
        }
        return cls(config, kinds, str(getattr(checkpoint, "folder", "")))


def _kind_of(checkpoint: Any, name: str, shape: tuple[int, ...]) -> str:
    """A tensor's format. One that is not decoded here is known from the file's head: sizes need no
    numbers.
    """
    if isinstance(checkpoint, Checkpoint) and (stored := checkpoint.stored(name)):
        kind = stored[0].dtype  # a name that safetensors have too (I32) is meant here in a GGUF alone
        if kind in NOT_DECODED and (checkpoint.kind == "gguf" or kind not in safetensors.DTYPES):
            return kind
    return _kind(fitting(checkpoint[name], shape, name))


def _kind(weight: Any) -> str:
    if isinstance(weight, ScaledFP8):
        return "E4M3"
    if isinstance(weight, ScaledInt4):
        return "INT4"
    if isinstance(weight, Packed | Interleaved):
        return formats.get(weight.ggml_type).NAME
    return "F32" if hasattr(weight, "dtype") else _kind(weight[0])


def weights(inventory: Inventory, place: Callable[[str], str], activations: str = "fp8") -> list[MemoryItem]:
    """The weights by component and device."""
    c = inventory.config
    sums: dict[tuple[str, str], MemoryItem] = {}
    for name, stored in inventory.tensors.items():
        module = name.removesuffix(".weight")
        kind = next(k for k, pattern in COMPONENTS.items() if re.search(pattern, name))
        device = place(module)
        nbytes, note = _loaded(name, stored, device, activations, _operator(place, module))
        used = (
            1 / c.vocab_size
            if kind == "embedding"
            else c.num_experts_per_tok / c.n_routed_experts
            if kind == "routed experts"
            else 1
        )
        old = sums.get((kind, device), MemoryItem(kind, device, 0))
        layer = names.layer_of(name)
        layers = old.layers if layer is None or layer in old.layers[-1:] else (*old.layers, layer)
        sums[kind, device] = MemoryItem(
            kind,
            device,
            old.nbytes + nbytes,
            old.bytes_per_token + round(nbytes * used),
            layers,
            note if note in old.note else ", ".join(filter(None, (old.note, note))),
        )
    return sorted(sums.values(), key=lambda p: (p.device != "cpu", p.device, [*COMPONENTS].index(p.name)))


def _operator(place: Callable[[str], str], module: str) -> str:
    return place.find(module).operator if hasattr(place, "find") else ""


def _loaded(name: str, stored: Stored, device: str, activations: str, operator: str) -> tuple[int, str]:
    """Bytes of a tensor where it is used, and in what form."""
    count, narrow = math.prod(stored.shape), (4, "float32") if activations == "exact" else (2, "bfloat16")
    as_numbers = name.endswith(("kv_b_proj.weight", "mlp.gate.weight")) or operator == "bf16"
    if device == "cpu":
        as_numbers = as_numbers and not stays_coded(name, stored)
        return (
            (4 * count, "float32")
            if as_numbers or len(stored.shape) == 1
            else (file_bytes(stored), f"{stored.kind} mapped")
        )
    if stored.kind == "E4M3" and not as_numbers:
        return _aligned(count) + _aligned(file_bytes(stored) - count), "E4M3 with scales"
    width, form = (
        (4, "float32")
        if stored.kind == "F32" or len(stored.shape) == 1
        else (2, "bfloat16")
        if stored.kind == "BF16"
        else narrow
    )
    return _aligned(width * count), form


def file_bytes(stored: Stored) -> int:
    """Bytes of a tensor in its file, scales included."""
    if stored.kind == "E4M3":
        return math.prod(stored.shape) + 4 * math.prod(-(-n // 128) for n in stored.shape[-2:]) * math.prod(
            stored.shape[:-2]
        )
    if stored.kind == "INT4":
        return math.prod(stored.shape) // 2 + 2 * math.prod(stored.shape) // int4.GROUP
    return formats.nbytes(formats.type_id(stored.kind), stored.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def cache(
    inventory: Inventory, place: Callable[[str], str], context: int, activations: str = "fp8"
) -> list[MemoryItem]:
    """The latent cache of one conversation, with each layer."""
    c, found = inventory.config, []
    width, rows = c.cache_width, capacity(context, c.max_position_embeddings)
    homes = [place(f"model.layers.{i}.self_attn") for i in range(c.num_hidden_layers)]
    for device in dict.fromkeys(homes):
        layers = tuple(i for i, home in enumerate(homes) if home == device)
        number = 4 if device == "cpu" or activations == "exact" else 2
        nbytes = len(layers) * _aligned(rows * width * number)
        read = len(layers) * (context if device == "cpu" else rows) * width * number
        found.append(
            MemoryItem("latent cache", device, nbytes, read, layers, f"{rows} rows of {width} x {number} B")
        )
    return found


def workspace(
    inventory: Inventory, place: Callable[[str], str], context: int, prefill: int = PREFILL
) -> list[MemoryItem]:
    """Activations at their peak, the larger of attention and MLP while `prefill` tokens go through a layer;
    what graphs keep; the libraries' own.
    """
    c, t = inventory.config, min(prefill, context)
    width = max(
        c.intermediate_size * (c.first_k_dense_replace > 0), c.moe_intermediate_size * c.n_shared_experts
    )
    queries = t * c.num_attention_heads * (c.qk_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    attention = queries + max(
        _absorbed(c, t, capacity(context, c.max_position_embeddings)), _expanded(c, t, context)
    )
    live = 2 * t * c.hidden_size + max(
        attention, 3 * t * width
    )  # float32: the stream and its norm; then what a module makes
    graphs = c.num_hidden_layers * 4 * c.hidden_size + 2 * c.vocab_size + _decoded(c, context)
    split = COUNTERS * (max(c.hidden_size, width) >= 8 * fp8.BLOCK)
    devices = dict.fromkeys(place(f"model.layers.{i}.self_attn") for i in range(c.num_hidden_layers))
    return [
        MemoryItem("workspace", d, 4 * (live + graphs) + LIBRARY + split, 0, (), f"{t} tokens at a time")
        for d in devices
        if d != "cpu"
    ]


def _decoded(c: DeepSeekConfig, context: int) -> int:
    """Numbers of 4 bytes that attention of one token holds in the memory of graphs, which layers share: its
    scores, and what shares of the rows were mixed to.
    """
    rows = capacity(context, c.max_position_embeddings)
    return c.num_attention_heads * (rows + min(SHARES, -(-rows // SHARE)) * c.kv_lora_rank)


def _expanded(c: DeepSeekConfig, tokens: int, rows: int) -> int:
    """Numbers of 4 bytes that attention of many tokens holds, 0 for few: of as many heads as are expanded at
    a time the keys and values of all rows, twice, what keys share, queries and results. What takes pieces
    of the rows for more heads (kernels/attention_torch.py) keeps to the same bytes.
    """
    if tokens < EXPANDED_FROM:
        return 0
    heads, width = c.num_attention_heads, c.qk_head_dim + c.v_head_dim
    one = rows * (width + c.qk_nope_head_dim + c.v_head_dim) + tokens * width
    nbytes = min(max(EXPANDED, tokens << 18), 4 * EXPANDED)
    pieces = -(-heads // max(1, nbytes // (4 * one)))
    return -(-heads // pieces) * one


def _absorbed(c: DeepSeekConfig, tokens: int, rows: int) -> int:
    """Numbers of 4 bytes that attention of few tokens holds at its peak: while it mixes the latents of all
    rows by the shares of some tokens.
    """
    heads, tokens = c.num_attention_heads, min(tokens, EXPANDED_FROM - 1)
    step = min(tokens, max(1, SCORES // (4 * heads * rows)))
    scores, latents = heads * step * rows, heads * step * c.kv_lora_rank
    # Shares are cut into three bf16 parts: all beside each other with what is left of them, or one, the next
    # and the rest.
    mixing = 5 * scores // 2 + 4 * latents if 12 * latents <= STACKED else 2 * scores + 2 * latents
    return latents + step * rows // 4 + scores + max(2 * scores, mixing)


def items(
    inventory: Inventory,
    place: Callable[[str], str],
    context: int,
    activations: str = "fp8",
    prefill: int = PREFILL,
) -> list[MemoryItem]:
    """Everything, device by device, where prompts are computed `prefill` tokens at a time."""
    found = [
        *weights(inventory, place, activations),
        *cache(inventory, place, context, activations),
        *workspace(inventory, place, context, prefill),
    ]
    return sorted(found, key=lambda p: (p.device == "cpu", p.device))  # stable: components keep their order


def prefill_tokens(
    inventory: Inventory,
    place: Callable[[str], str],
    free: Mapping[str, int],
    context: int = CONTEXT,
    activations: str = "fp8",
) -> int:
    """How many tokens of a prompt are computed at a time: MOST_PREFILL, or half as many again and again down
    to PREFILL, as there is room for on the GPUs beside weights and a cache of `context` tokens. Where all is
    on the CPU, see `prefill_on_cpu`.
    """
    c = inventory.config
    if {place(f"model.layers.{i}.self_attn") for i in range(c.num_hidden_layers)} == {"cpu"}:
        return prefill_on_cpu(c, free.get("cpu", 0))
    context, tokens = min(context, c.max_position_embeddings), MOST_PREFILL
    while tokens > PREFILL:
        need = totals(items(inventory, place, context, activations, tokens))
        gpus = need.keys() - {"cpu"}
        if gpus and all(need[d] + CONTEXT_BYTES <= free.get(d, 0) for d in gpus):
            break
        tokens //= 2
    return tokens


def prefill_on_cpu(c: DeepSeekConfig, free: int) -> int:
    """How many tokens of a prompt the CPU computes at a time: so many that an expert gets PER_EXPERT of them,
    PREFILL at least and MOST_ON_CPU at most, and as take no more than a SPARED-th of so many bytes.
    """
    wanted, tokens = PER_EXPERT * c.n_routed_experts // max(1, c.num_experts_per_tok), PREFILL
    while 2 * tokens <= min(wanted, MOST_ON_CPU) and SPARED * 4 * _on_cpu(c, 2 * tokens) <= free:
        tokens *= 2
    return tokens


def _on_cpu(c: DeepSeekConfig, tokens: int) -> int:
    """Numbers of 4 bytes that a layer on the CPU holds for so many tokens: queries in latents and what they
    are mixed to, or all that experts make.
    """
    attention = c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_head_dim + c.v_head_dim)
    experts = c.num_experts_per_tok * (c.hidden_size + 3 * c.moe_intermediate_size)
    return tokens * (2 * c.hidden_size + max(attention, experts, 3 * c.intermediate_size))


def totals(found: Iterable[MemoryItem]) -> dict[str, int]:
    """The sum of bytes on each device, by its name."""
    sums: dict[str, int] = {}
    for p in found:
        sums[p.device] = sums.get(p.device, 0) + p.nbytes
    return sums


def free_memory() -> dict[str, int]:
    """Bytes free: {"cpu": RAM, "cuda:0": VRAM, ...}, as far as they can be told without importing torch for
    nothing.
    """
    found = {"cpu": free_ram()}
    if ops.sees_gpu():
        import torch  # seconds; it is there, or no GPU had been seen

        found |= {f"cuda:{i}": torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    return found


def free_ram() -> int:
    """Bytes of main memory that are free."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = container_room()
    return free if room is None else min(free, room)


def container_room(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the limit of a container leaves (cgroup v2); pages of files count as free, as they can go.
    None where there is no limit.
    """
    try:
        most, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, most - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such files, or "max" for no limit
        return None


def check_memory(backend: Backend, checkpoint: Any, config: DeepSeekConfig) -> int:
    """How many tokens of a prompt there is room for at a time.

    ResourceError E7020 where a GPU has not the room for its part of the model, with the smallest cache;
    UnsupportedError E7010 where it is not there. On the CPU weights are mapped, and always fit.
    """
    if on_cpu_tensors():
        return PREFILL
    if backend.place is None:
        return prefill_on_cpu(config, free_ram()) if backend.name == "cpu" else PREFILL
    inventory, free = Inventory.of(checkpoint, config), free_memory()
    found = items(inventory, backend.place, INITIAL_ROWS, backend.activations)
    if missing := set(totals(found)) - set(free):
        raise refusal("E7010", ", ".join(sorted(missing)), expected=", ".join(sorted(free)))
    check_fits(found, free, getattr(checkpoint, "folder", "model"))
    return prefill_tokens(inventory, backend.place, free, CONTEXT, backend.activations)


def check_fits(found: Iterable[MemoryItem], free: Mapping[str, int], where: object) -> None:
    """ResourceError E7020 where a GPU has not the room. RAM is not refused: weights there are mapped, and
    read again from disk if they must be.
    """
    found = list(found)
    for device, need in totals(found).items():
        if device != "cpu" and need > free.get(device, 0):
            largest = sorted((p for p in found if p.device == device), key=lambda p: -p.nbytes)[:4]
            terms = " + ".join(f"{p.name} {size(p.nbytes)}" for p in largest)
            raise refusal(
                "E7020",
                where,
                device=device,
                terms=terms,
                found=size(free.get(device, 0)),
                expected=size(need),
            )
