"""Does a model fit here, and how fast can it be? What it takes of VRAM and RAM, before anything is loaded.

    python -m refimpl.plan --model_path DIR                           a model of yours, here
    python -m refimpl.plan --config deepseek-r1 --vram 24 --ram 512   another machine

Weights are counted as the cuda backend keeps them (refimpl/devices/cuda.py): FP8 with its scales, BF16 and
F32 as stored, GGML blocks and `kv_b` as bfloat16, one-dimensional tensors as float32; on the CPU they stay in
the mapped file. Loading refuses what does not fit, with this table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refimpl import arithmetic, formats, ops
from refimpl.cache import INITIAL_ROWS, PREFILL
from refimpl.checkpoint import names
from refimpl.cli import Parser, completed, integer, number, ranges, run, size, to_json
from refimpl.cli.waiting import announce
from refimpl.config import DeepSeekConfig
from refimpl.devices import placement
from refimpl.devices.memory import (
    ALIKE,
    CONTEXT,
    CONTEXT_BYTES,
    Inventory,
    MemoryItem,
    builtin_configs,
    free_memory,
    free_ram,
    items,
    prefill_tokens,
    totals,
)
from refimpl.devices.speed import copy_bandwidth, expert_rates, read_bandwidth
from refimpl.kernels import processors
from refimpl.loading import hub, interleaving

# GB/s where nothing is measured
ASSUMED = {"cuda": 1008.0, "cpu": 250.0}
ASSUMPTIONS = {
    "cpu": (ASSUMED["cpu"], "assumed: eight channels of DDR5-4000"),
    "cuda": (ASSUMED["cuda"], "assumed: an RTX 4090's"),
}


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
    or the arithmetic at the rates of "cpu" and "cuda", whichever is longer. Attention on the CPU is float32,
    whose rate is "floats".
    """
    flops = {p.name: p.token_flops for p in arithmetic.components(c)}
    times: dict[str, float] = {}
    for start in range(0, tokens, prefill):
        n = min(prefill, tokens - start)
        chosen = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** n  # of all experts, by one or more
        for p in found:
            where = "cpu" if p.device == "cpu" else "cuda"
            nbytes, work, rate = p.bytes_per_token, n * flops.get(p.name, 0), where
            if p.name == "routed experts":
                nbytes = round(p.nbytes * chosen)
            elif p.name == "latent cache":
                work = arithmetic.prompt_attention_flops(c, n, start + n)
                work = work * len(p.layers) // c.num_hidden_layers
                rate = "floats" if where == "cpu" else where
            elif p.name == "head":
                work //= n  # for the last token
            seconds = max(nbytes / gbps[where], work / gflops[rate]) / 1e9
            times[p.name] = times.get(p.name, 0.0) + seconds
    return times


# --- the machine --------------------------------------------------------------------------------------------


def measured(inventory: Inventory) -> dict[str, tuple[float, str]]:
    """GB/s of the CPU's memory, of the GPU's, and of what the CPU's cores take in of this model's experts;
    and how they are known.
    """
    threads = processors.usable()
    found = {
        "cpu": (read_bandwidth(threads), f"measured, {threads} threads"),
        "cuda": ASSUMPTIONS["cuda"],
    }
    if ops.sees_gpu():
        found["cuda"] = (copy_bandwidth(), "measured")
    if (types := expert_types(inventory)) is not None:
        c = inventory.config
        repack = interleaving.is_made("auto", interleaving.cost_of(inventory), free_ram())
        one = expert_rates(threads, types, c.hidden_size, c.moe_intermediate_size, repack).core_gbps
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


def show(found: list[MemoryItem]) -> Iterator[str]:
    """The plan as a table for people, in MB for a model of less than a GB."""
    scale, unit = (1e9, "GB") if max(totals(found).values(), default=0) >= 1e9 else (1e6, "MB")
    for device, total in totals(found).items():
        yield f"{device:29} {size(total):>9}"
        for p in (p for p in found if p.device == device):
            layers = f"layers {ranges(p.layers)}" if p.layers and p.name != "norms" else ""
            yield f"  {p.name:24} {p.nbytes / scale:9.3f} {unit}  {p.note:26} {layers}".rstrip()


def _gigabytes(text: str) -> float:
    """24, or 24GB."""
    return number(0, 1e6)(re.sub(r"\s*GB?$", "", text, flags=re.IGNORECASE))


def _parser() -> Parser:
    parser = Parser("python -m refimpl.plan", __doc__)
    parser.stray = "a name goes behind --config, a model's folder behind --model_path or --gguf_path"
    parser.add_argument("--model_path", metavar="DIR", help="a model's folder (default: the embedded model)")
    parser.add_argument(
        "--gguf_path", metavar="DIR", help="the weights: a hybrid folder, a GGUF file or folder"
    )
    names = [*builtin_configs(), *ALIKE]
    config = parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"a model of this list instead, with Q4_K_M experts: {', '.join(names)}",
    )
    completed(config, lambda: names)
    parser.add_argument(
        "--context",
        type=integer(),
        default=CONTEXT,
        metavar="N",
        help=f"tokens of a conversation (default {CONTEXT}, or the model's own limit)",
    )
    for what, name in (("vram", "each GPU"), ("ram", "main memory")):
        parser.add_argument(
            f"--{what}",
            type=_gigabytes,
            metavar="GB",
            help=f"answer for a machine with so many GB (1e9 bytes) of {name}"
            + (" (0: without a GPU)" if what == "vram" else ""),
        )
    parser.add_argument(
        "--optimize_config_path",
        metavar="RULES.yaml",
        help="placement rules (default: experts and embedding on the CPU)",
    )
    parser.add_argument(
        "--activations",
        default="fp8",
        choices=("fp8", "exact"),
        help="fp8: as the real system computes; exact: float32 throughout",
    )
    for what in ("cpu", "gpu"):
        parser.add_argument(
            f"--{what}_gbps",
            type=number(1e-3, 1e9),
            metavar="X",
            help=f"reckon with this bandwidth of {what.upper()} memory",
        )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


class Plan(NamedTuple):
    """A model on a machine. `free` are bytes by device, `known` GB/s with how they are known."""

    inventory: Inventory
    place: Callable[[str], str]
    context: int
    activations: str
    free: dict[str, int]
    known: dict[str, tuple[float, str]]

    def found(self, context: int | None = None) -> list[MemoryItem]:
        """Every part of the model that takes memory, for a cache of `context` tokens, or of the plan's own
        number of them where it is None.
        """
        chosen = self.context if context is None else context
        return items(self.inventory, self.place, chosen, self.activations)

    def fits(self, context: int | None = None) -> dict[str, bool | None]:
        """By device; None for one that is not there."""
        need = totals(self.found(context))
        return {d: None if d not in self.free else n <= self.free[d] for d, n in need.items()}

    def tokens_per_s(self) -> float:
        """The most tokens a second that decoding can reach at the plan's known rates of memory."""
        return 1 / decode_seconds(self.found(), {k: v for k, (v, _) in self.known.items()})

    def prefill(self) -> int:
        """Tokens of a prompt that are computed at a time."""
        return prefill_tokens(self.inventory, self.place, self.free, self.context, self.activations)


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.plan` with these arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.config and (args.model_path or args.gguf_path):
        parser.error("--config names a model of the list, --model_path and --gguf_path a folder: one of them")
    asked = args.vram is not None or args.ram is not None
    plan = _plan(args, asked)
    if args.json:
        print(to_json(_report(plan)))
    else:
        print("\n".join(_answer(plan) if asked else _table(plan)))
    return None


def _plan(args: Any, asked: bool) -> Plan:
    """The model and the machine of these flags: this one, or the one `asked` for."""
    inventory = _inventory(args)
    if args.vram == 0 and not args.optimize_config_path:
        place: Callable[[str], str] = _all_on_cpu
    else:
        place = placement.load(args.optimize_config_path or placement.HYBRID, inventory.config)
    context = min(args.context, inventory.config.max_position_embeddings)
    found = items(inventory, place, context, args.activations)
    free = _asked_memory(args, totals(found)) if asked else free_memory()
    known = _bandwidths(args, ASSUMPTIONS if asked else None, inventory)
    return Plan(inventory, place, context, args.activations, free, known)


def _all_on_cpu(module: str) -> str:
    return "cpu"


def _inventory(args: Any) -> Inventory:
    if args.config:
        return Inventory.builtin(args.config)
    if args.gguf_path and args.model_path:
        weights = hub.resolve(Path(args.gguf_path))
        return Inventory.open(weights, hub.resolve(args.model_path, weights=False))
    return Inventory.open(args.gguf_path or args.model_path or hub.embedded())


def _asked_memory(args: Any, devices: Iterable[str]) -> dict[str, int]:
    """The memory that --vram and --ram say; what one of them leaves open is this machine's."""
    found = free_memory() if args.vram is None or args.ram is None else {}
    if args.ram is not None:
        found["cpu"] = int(args.ram * 1e9)
    if args.vram is not None:
        room = max(0, int(args.vram * 1e9 - CONTEXT_BYTES))  # the driver takes its part first
        found = {"cpu": found["cpu"]} | {d: room for d in devices if d != "cpu"}
    return found


def _report(plan: Plan) -> dict[str, Any]:
    """The object that --json prints: parts, totals and free memory in bytes, rates in GB/s and tokens/s."""
    repack = interleaving.cost_of(plan.inventory)
    return {
        "model": plan.inventory.name,
        "context": plan.context,
        "parts": [p.report() for p in plan.found()],
        "totals": totals(plan.found()),
        "free": plan.free,
        "fits": plan.fits(),
        "prefill_tokens": plan.prefill(),
        "gbps": {k: {"value": v, "known": how} for k, (v, how) in plan.known.items()},
        "tokens_per_s": plan.tokens_per_s(),
        "repack": {
            "nbytes": repack.nbytes,
            "seconds": repack.seconds,
            "by_default": interleaving.is_made("auto", repack, plan.free["cpu"]),
        },
    }


def _table(plan: Plan) -> Iterator[str]:
    """Every part, and what this machine has for it."""
    yield f"{plan.inventory.name}, context {plan.context}\n"
    yield from show(plan.found())
    yield ""
    for device, n in totals(plan.found()).items():
        short = (
            "more than fits: experts will be read from disk again and again"
            if device == "cpu"
            else "does not fit"
        )
        room = (
            "no such device here"
            if device not in plan.free
            else f"{size(plan.free[device])} free: {'fits' if plan.fits()[device] else short}"
        )
        driver = "" if device == "cpu" else f" (and about {size(CONTEXT_BYTES)} for the driver)"
        yield f"{device:7} needs {size(n)}; {room}{driver}"
    yield _prompts(plan.inventory, plan.place, plan.context, plan.activations, plan.prefill())
    if interleaving.expert_bytes(plan.inventory):
        yield _repack(plan)
    for what, (value, how) in plan.known.items():
        yield f"{what:7} {value:.0f} GB/s ({how})"
    yield f"decode at most {plan.tokens_per_s():.1f} tokens/s at that: every byte of a token read once"


def _repack(plan: Plan) -> str:
    """What `--repack` takes here, and whether loading does it unasked."""
    cost = interleaving.cost_of(plan.inventory)
    why = cost.why_not(plan.free["cpu"])
    unasked = f"not unasked: {why}" if why else "done unasked"
    return (
        f"experts  rearranged at load: a copy of {size(cost.nbytes)}, about {cost.seconds:.1f} s; {unasked}"
    )


def _answer(plan: Plan) -> Iterator[str]:
    """Does it fit, and how fast: a few lines for a machine that was asked about."""
    need, fits = totals(plan.found()), plan.fits()
    words = "Yes, it fits" if all(fits.values()) else "No, it does not fit"
    yield f"{words}: {plan.inventory.name}, with a conversation of {plan.context} tokens.\n"
    for device, n in need.items():
        yield f"  {_memory_name(device, need):12} {_of(device, n, plan)}"
    used = [k for k in plan.known if k != "cuda" or need.keys() - {"cpu"}]
    if_so = "all bytes of one are read once" if all(fits.values()) else "if it had the room"
    yield f"  speed        at most {plan.tokens_per_s():.1f} tokens a second: {if_so}\n"
    for what in used:
        value, how = plan.known[what]
        yield f"  {'RAM' if what == 'cpu' else 'GPU memory'} of {value:.0f} GB/s is {how}."
    if advice := _advice(plan):
        yield f"  {advice}"
    yield "  Run this there without --vram and --ram, and both are measured."


def _memory_name(device: str, need: Mapping[str, int]) -> str:
    if device == "cpu":
        return "RAM"
    return "GPU memory" if len(need) <= 2 else f"GPU {device.partition(':')[2]}"


def _of(device: str, n: int, plan: Plan) -> str:
    """What a device must hold and has."""
    if device not in plan.free:
        return f"{size(n)} needed, and there is no such GPU"
    has = plan.free[device] + (0 if device == "cpu" else CONTEXT_BYTES)
    driver = "" if device == "cpu" else f" and {size(CONTEXT_BYTES)} for the driver"
    short = "" if plan.fits()[device] else ": too little"
    if short and device == "cpu":
        short += ", experts would be read from disk over and over"
    return f"{size(n)}{driver} of {size(has)}{short}"


def _advice(plan: Plan) -> str:
    """A shorter conversation that GPUs have room for, where that is what is wrong."""
    if all(ok for d, ok in plan.fits().items() if d != "cpu"):
        return ""
    context = plan.context // 2
    while context >= INITIAL_ROWS:
        if all(ok for d, ok in plan.fits(context).items() if d != "cpu"):
            return f"A conversation of {context} tokens has room on the GPU: --context {context}."
        context //= 2
    return "No shorter conversation fits there; --vram 0 tells of the CPU alone."


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


def _bandwidths(
    args: Any, assumed: Mapping[str, tuple[float, str]] | None, inventory: Inventory
) -> dict[str, tuple[float, str]]:
    """Those given, and for the others those `assumed` or, where nothing is, measured."""
    given = {"cpu": args.cpu_gbps, "cuda": args.gpu_gbps}
    if not assumed and not all(given.values()):
        announce("measuring memory and cores (--cpu_gbps and --gpu_gbps spare it)")
    known = {} if all(given.values()) else dict(assumed) if assumed else measured(inventory)
    if args.cpu_gbps:
        known.pop("cores", None)  # those of this machine
    return known | {k: (v, "given") for k, v in given.items() if v}


if __name__ == "__main__":
    sys.exit(run(main))
