"""What a model takes of VRAM and RAM, and how fast it can decode, before anything of it is loaded.

    python -m refimpl.plan [--model_path DIR | --config deepseek-v3] [--context N] [--optimize_config_path
    RULES.yaml] [--json]

Weights are counted as the cuda backend keeps them (refimpl/devices/cuda.py): FP8 with its scales, BF16 and
F32 as stored, GGML blocks and `kv_b` as bfloat16, one-dimensional tensors as float32; on the CPU they stay in
the mapped file. Loading refuses what does not fit, with this table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from refimpl import arithmetic, formats, ops
from refimpl.cache import PREFILL
from refimpl.checkpoint import names
from refimpl.cli import Parser, integer, number, ranges, run, size, to_json
from refimpl.config import DeepSeekConfig
from refimpl.devices import placement
from refimpl.devices.memory import (
    CONTEXT,
    CONTEXT_BYTES,
    Inventory,
    MemoryItem,
    builtin_configs,
    free_memory,
    items,
    prefill_tokens,
    totals,
)
from refimpl.devices.speed import copy_bandwidth, expert_rates, read_bandwidth
from refimpl.loading import hub

ASSUMED = {
    "cuda": 1008.0,
    "cpu": 250.0,
}  # GB/s where nothing is measured: an RTX 4090, eight channels of DDR5-4000


# --- bytes --------------------------------------------------------------------------------------------------


def decode_seconds(found: Iterable[MemoryItem], gbps: Mapping[str, float]) -> float:
    """The least time of a token: all it touches read once, at the GB/s of "cpu" and "cuda", and where it is
    known no faster than "cores", what all of the CPU's cores together take in of routed experts. GPUs go one
    after another, and the routed experts beside the shared one.
    """
    return together(part_seconds(found, gbps))


def part_seconds(found: Iterable[MemoryItem], gbps: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a token by component, each by itself."""
    times: dict[str, float] = {}
    for p in found:
        seconds = p.bytes_per_token / gbps["cpu" if p.device == "cpu" else "cuda"] / 1e9
        if p.name == "routed experts" and p.device == "cpu" and "cores" in gbps:
            seconds = max(seconds, p.bytes_per_token / gbps["cores"] / 1e9)
        times[p.name] = times.get(p.name, 0.0) + seconds
    return times


def together(times: Mapping[str, float]) -> float:
    """Seconds of components of which the routed experts and the shared one go side by side."""
    beside = min(times.get("routed experts", 0.0), times.get("shared expert", 0.0))
    return sum(times.values()) - beside


def prefill_seconds(
    c: DeepSeekConfig,
    found: Iterable[MemoryItem],
    tokens: int,
    gbps: Mapping[str, float],
    gflops: Mapping[str, float],
    prefill: int = PREFILL,
) -> dict[str, float]:
    """The least seconds of a prompt by component, `prefill` tokens at a time: reading what they touch once,
    or the arithmetic at the rates of "cpu" and "cuda", whichever is longer.
    """
    flops = {p.name: p.token_flops for p in arithmetic.components(c)}
    times: dict[str, float] = {}
    for start in range(0, tokens, prefill):
        n = min(prefill, tokens - start)
        chosen = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** n  # of all experts, by one or more
        for p in found:
            where = "cpu" if p.device == "cpu" else "cuda"
            nbytes, work = p.bytes_per_token, n * flops.get(p.name, 0)
            if p.name == "routed experts":
                nbytes = round(p.nbytes * chosen)
            elif p.name == "latent cache":
                work = arithmetic.prompt_attention_flops(c, n, start + n)
                work = work * len(p.layers) // c.num_hidden_layers
            elif p.name == "head":
                work //= n  # for the last token
            seconds = max(nbytes / gbps[where], work / gflops[where]) / 1e9
            times[p.name] = times.get(p.name, 0.0) + seconds
    return times


# --- the machine --------------------------------------------------------------------------------------------


def measured(inventory: Inventory) -> dict[str, tuple[float, str]]:
    """GB/s of the CPU's memory, of the GPU's, and of what the CPU's cores take in of this model's experts;
    and how they are known.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {
        "cpu": (read_bandwidth(threads), f"measured, {threads} threads"),
        "cuda": (ASSUMED["cuda"], "assumed: an RTX 4090's"),
    }
    if ops.sees_gpu():
        found["cuda"] = (copy_bandwidth(), "measured")
    if (types := expert_types(inventory)) is not None:
        c = inventory.config
        one = expert_rates(threads, types, c.hidden_size, c.moe_intermediate_size).core_gbps
        found["cores"] = (one * threads, f"measured, {one:.1f} for each of {threads} threads")
    return found


def expert_types(inventory: Inventory) -> tuple[str, str] | None:
    """The commonest GGML types of gate and down projections of routed experts; None where they are none that
    are quantized here.
    """
    written = {m.NAME for m in formats.FORMATS.values() if hasattr(m, "quantize") and "_" in m.NAME}
    found = []
    for side in ("gate_proj", "down_proj"):
        kinds = [s.kind for n, s in inventory.tensors.items() if names.is_routed_expert(n) and side in n]
        found.append(max(set(kinds), key=kinds.count) if kinds else "")
    return (found[0], found[1]) if written.issuperset(found) else None


# --- the command --------------------------------------------------------------------------------------------


def show(found: list[MemoryItem]) -> None:
    """The plan as a table for people."""
    for device, total in totals(found).items():
        print(f"{device:29} {size(total):>9}")
        for p in (p for p in found if p.device == device):
            layers = f"layers {ranges(p.layers)}" if p.layers and p.name != "norms" else ""
            print(f"  {p.name:24} {p.nbytes / 1e9:9.3f} GB  {p.note:26} {layers}".rstrip())


def _parser() -> Parser:
    parser = Parser("python -m refimpl.plan", __doc__)
    parser.add_argument("--model_path", metavar="DIR", help="a model's folder (default: the embedded model)")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"a config of this package instead: {', '.join(builtin_configs())}",
    )
    parser.add_argument(
        "--context",
        type=integer(),
        default=CONTEXT,
        metavar="N",
        help=f"tokens of a conversation (default {CONTEXT}, or the model's own limit)",
    )
    parser.add_argument(
        "--optimize_config_path",
        metavar="RULES.yaml",
        help="placement rules (default: experts and embedding on the CPU)",
    )
    parser.add_argument("--activations", default="fp8", choices=("fp8", "exact"))
    for what in ("cpu", "gpu"):
        parser.add_argument(
            f"--{what}_gbps",
            type=number(1e-3, 1e9),
            metavar="X",
            help=f"reckon with this bandwidth of {what.upper()} memory",
        )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.plan` with these arguments."""
    args = _parser().parse_args(argv)
    inventory = (
        Inventory.builtin(args.config) if args.config else Inventory.open(args.model_path or hub.embedded())
    )
    place = placement.load(args.optimize_config_path or placement.HYBRID, inventory.config)
    context = min(args.context, inventory.config.max_position_embeddings)
    found, free = items(inventory, place, context, args.activations), free_memory()
    known = _bandwidths(args, inventory)
    need, seconds = totals(found), decode_seconds(found, {k: v for k, (v, _) in known.items()})
    prefill = prefill_tokens(inventory, place, free, context, args.activations)
    fits = {d: None if d not in free else n <= free[d] for d, n in need.items()}
    if args.json:
        report: dict[str, Any] = {
            "model": inventory.name,
            "context": context,
            "parts": [p.report() for p in found],
            "totals": need,
            "free": free,
            "fits": fits,
            "prefill_tokens": prefill,
            "gbps": {k: {"value": v, "known": how} for k, (v, how) in known.items()},
            "tokens_per_s": 1 / seconds,
        }
        print(to_json(report))
        return None
    print(f"{inventory.name}, context {context}\n")
    show(found)
    print()
    for device, n in need.items():
        short = (
            "more than fits: experts will be read from disk again and again"
            if device == "cpu"
            else "does not fit"
        )
        room = (
            "no such device here"
            if device not in free
            else f"{size(free[device])} free: {'fits' if fits[device] else short}"
        )
        print(
            f"{device:7} needs {size(n)}; {room}"
            + ("" if device == "cpu" else f" (and about {size(CONTEXT_BYTES)} for the driver)")
        )
    print(_prompts(inventory, place, context, args.activations, prefill))
    for what, (value, how) in known.items():
        print(f"{what:7} {value:.0f} GB/s ({how})")
    print(f"decode at most {1 / seconds:.1f} tokens/s at that: every byte of a token read once")
    return None


def _prompts(
    inventory: Inventory, place: Callable[[str], str], context: int, activations: str, prefill: int
) -> str:
    """How prompts are read, and what that takes more than is in the table, of all GPUs."""
    told = f"prompts {prefill} tokens at a time"
    least, found = (
        sum(n for d, n in totals(items(inventory, place, context, activations, t)).items() if d != "cpu")
        for t in (PREFILL, prefill)
    )
    return told if found <= least else f"{told}, with {size(found - least)} more workspace"


def _bandwidths(args: Any, inventory: Inventory) -> dict[str, tuple[float, str]]:
    given = {"cpu": args.cpu_gbps, "cuda": args.gpu_gbps}
    known = {} if all(given.values()) else measured(inventory)
    if args.cpu_gbps:
        known.pop("cores", None)  # those of this machine
    return known | {k: (v, "given") for k, v in given.items() if v}


if __name__ == "__main__":
    sys.exit(run(main))
