"""The whole system before its weights are there: `python -m refimpl.bench system [--config deepseek-v3]
[--layers N] [--folder DIR]`.

Makes a folder with random weights of the model's true shape, as many layers as fit (in memory, that is
/dev/shm, or where --folder says), loads it as `refimpl.chat` would, and measures loading, the first token,
decoding behind several contexts, prompts of several lengths, VRAM and RAM, each beside what `refimpl.plan`
predicts from bandwidths that are measured first. Then it takes a token and a prompt apart:

    experts       in the thread that computes them, on the CPU
    GPU           its kernels, as the driver's own record has them
    transfers     copies between host and GPU, from the same record
    Python        launching and handing over: the same token with experts that return at once, less the two
                  above
    waiting       what the whole takes beyond all of these: threads that wake late or are in each other's way;
                  below zero where the GPU worked beside the experts

On the CPU alone attention, MLPs and experts are told apart, and the rest is norms, router, head and Python.
Contexts are filled with random rows. What a model of all layers would do is extrapolated: its prediction at
the share of the prediction that these layers reached.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from refimpl import ops
from refimpl.bench import random_model
from refimpl.bench.running import CONTEXTS, PROMPTS, Bench
from refimpl.cli import Parser, Progress, integer, size, to_json
from refimpl.devices import memory, placement, steps
from refimpl.errors import refusal
from refimpl.files import atomic, check_writable
from refimpl.kernels import processors
from refimpl.loading import interleaving

SPARE = 0.85  # of what is free


# --- what fits ----------------------------------------------------------------------------------------------


def fitting(args: Namespace, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the layers that are asked for, or as many as there is room for in files, RAM and VRAM.
    Files in memory leave less of it for the copy that loading makes. ResourceError E5102 where they do not
    fit.
    """
    held = sum(f.stat().st_size for f in folder.glob("model-*.safetensors"))  # used again, or replaced
    free = memory.free_memory()
    files = shutil.disk_usage(folder).free + held
    in_memory = _in_memory(folder)
    ram = free["cpu"] + held * in_memory
    room = files if args.layers else SPARE * min(files, ram)
    for layers in [args.layers] if args.layers else range(raw["num_hidden_layers"], 1, -1):
        found = random_model.smaller(raw, layers, args.experts, args.vocabulary)
        need = random_model.nbytes(found)
        if need > room:
            continue
        with_copy = need + (_copied(found, args) if in_memory else 0)
        if args.layers or (with_copy <= SPARE * ram and _fits_gpus(found, free, args)):
            return found
    raise refusal("E5102 another", folder, found=f"{size(room)} free", expected=size(need))


def _in_memory(folder: Path) -> bool:
    """Whether files there take memory, as in Linux's /dev/shm."""
    device = os.stat(folder).st_dev
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return kind.split()[0] in ("tmpfs", "ramfs")
    return False


def _copied(raw: dict[str, Any], args: Namespace) -> int:
    """Bytes of experts that loading copies in memory, where there is room."""
    backend = ops.best_backend() if args.backend == "auto" else args.backend
    cost = interleaving.cost_of(random_model.inventory(raw))
    wanted = args.repack == "auto" and interleaving.pays(backend, args.activations)
    return cost.nbytes if wanted and interleaving.is_made("auto", cost, sys.maxsize) else 0


def _fits_gpus(raw: dict[str, Any], free: Mapping[str, int], args: Namespace) -> bool:
    inventory = random_model.inventory(raw)
    if len(free) == 1 or args.backend not in ("auto", "cuda"):
        return True
    place = placement.load(args.optimize_config_path or placement.HYBRID, inventory.config)
    longest = max(*(args.context or CONTEXTS), *(args.tokens or PROMPTS))
    need = memory.totals(memory.items(inventory, place, longest, args.activations))
    return all(n <= SPARE * free.get(d, 0) for d, n in need.items() if d != "cpu")


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Where the files go: the folder given, which is kept, or one in memory for this run."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="refimpl-", dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


# --- the command --------------------------------------------------------------------------------------------


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return size(value) if unit == "B" else f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _order(choice: str, nbytes: int, kept: bool) -> str:
    """How experts lie in memory."""
    if nbytes:
        return f"with rows side by side, a copy of {size(nbytes)} made at load (--repack {choice})"
    return "with rows side by side, a copy that was kept" if kept else f"as in the files (--repack {choice})"


def show(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines for people."""
    here, full = report["layers"], report["layers_full"]
    yield (
        f"{report['config']}, RANDOM weights, {here} of {full} layers "
        f"({report['dense_layers']} dense), {report['experts']} experts, {size(report['nbytes'])} in files"
    )
    yield f"{report['cpu']}, {report['cores']} cores{', ' + report['gpu'] if report['gpu'] else ''}"
    yield f"backend {report['backend']}, activations {report['activations']}"
    yield f"experts {_order(**report['repack'])}"
    yield "measured first: " + ", ".join(f"{k} {v:.1f} GB/s" for k, v in report["gbps"].items())
    yield "                " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in report["gflops"].items())
    yield ""
    last = f"{full} layers, extrapolated" if full != here else ""
    yield f"{'':18}{'threads':>8}{'measured':>18}{'plan':>18}{'share':>7}  {last}"
    for r in report["rows"]:
        name = r["what"] + ("" if r["at"] is None else f" {r['at']}")
        share = "-" if r["share"] is None else f"{r['share']:.0%}"
        line = f"{name:18}{r['threads']:8}{_figure(r['measured'], r['unit']):>18}"
        line += f"{_figure(r['predicted'], r['unit']):>18}{share:>7}"
        if full != here and r["extrapolated"] is not None:
            line += f"  {_figure(r['extrapolated'], r['unit'])} of {_figure(r['predicted_full'], r['unit'])}"
        yield line + (f"  beside {r['reading']:.1f} GB/s" if r["reading"] else "")
    for what, apart in report["breakdown"].items():
        yield ""
        yield f"{what}: {apart['ms']:.2f} ms"
        for part in dict.fromkeys([*apart["parts"], *apart["predicted"]]):
            ms, bound = apart["parts"].get(part), apart["predicted"].get(part)
            told = f"{ms:10.2f} ms {ms / apart['ms']:5.0%}" if ms is not None else f"{'':19}"
            yield f"  {part:26}{told}" + (f"   plan {bound:.2f} ms" if bound is not None else "")
    yield ""
    yield from _says_of_threads(report)


def draw(report: dict[str, Any], path: Path, *, force: bool = False) -> None:
    """Tokens a second against the tokens before them, measured and planned; raises as `atomic`."""
    from refimpl.plots import Picture  # brings matplotlib, optional

    rows = [r for r in report["rows"] if r["what"] == "decode"]
    here, full = report["layers"], report["layers_full"]
    title = (
        f"{report['config']}, {here} of {full} layers, {report['cores']} cores, {report['gpu'] or 'no GPU'}"
    )
    picture = Picture("Decoded tokens a second against the length of the context.", 6.4, 3.4)
    (ax,) = picture.axes
    for threads in dict.fromkeys(r["threads"] for r in rows):
        own = [r for r in rows if r["threads"] == threads]
        at, label = [r["at"] for r in own], f"{threads} thread{'s' * (threads > 1)}"
        (line,) = ax.plot(at, [r["measured"] for r in own], marker="o", markersize=4, label=label)
        ax.plot(at, [r["predicted"] for r in own], ls=":", color=line.get_color(), label=f"plan, {label}")
    top = 1.1 * max(max(r["measured"], r["predicted"]) for r in rows)
    ax.set(title=title, xlabel="tokens of context", ylabel="tokens a second", xscale="log", ylim=(0, top))
    at = sorted({r["at"] for r in rows})
    ax.set_xticks(at, [f"{n:,}" for n in at])
    ax.minorticks_off()
    picture.legend(ax)
    with atomic(path, force=force) as file:
        picture.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})


def _arguments(argv: list[str]) -> Namespace:
    parser = Parser("python -m refimpl.bench system", __doc__)
    parser.add_argument(
        "--config", default="deepseek-v3", help="whose shape: deepseek-v3, or tiny, the embedded model's"
    )
    parser.add_argument(
        "--layers", type=integer(2), metavar="N", help="two or more (default: as many as fit)"
    )
    parser.add_argument("--experts", type=integer(2), metavar="N", help="in a layer (default: the config's)")
    parser.add_argument(
        "--vocabulary", type=integer(2), metavar="N", help="tokens known (default: the config's)"
    )
    parser.add_argument(
        "--tokens",
        type=integer(1),
        action="append",
        metavar="N",
        help=f"length of a prompt, may be repeated (default {PROMPTS})",
    )
    parser.add_argument(
        "--context",
        type=integer(2),
        action="append",
        metavar="N",
        help=f"tokens before those that are decoded, may be repeated (default {CONTEXTS})",
    )
    parser.add_argument("--backend", default="auto", choices=("auto", *ops.BACKENDS))
    parser.add_argument(
        "--optimize_config_path", metavar="RULES.yaml", help="placement rules, of several GPUs for example"
    )
    parser.add_argument("--activations", default="fp8", choices=("fp8", "exact"))
    interleaving.add_flag(parser)
    parser.add_argument(
        "--threads",
        type=integer(1),
        action="append",
        metavar="N",
        help="may be repeated: the others only decode (default: what the kernels take by themselves)",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="for the files, kept and used again (default: in memory)"
    )
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FILE.svg",
        help="decoding against context, as a picture (needs matplotlib)",
    )
    parser.add_argument("--force", action="store_true", help="replace the picture, if there is one")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    if args.draw:
        if find_spec("matplotlib") is None:
            parser.error("--draw needs matplotlib: pip install 'refimpl[notebooks]'")
        check_writable(args.draw, force=args.force)
    if args.repack == "yes" and args.folder is None:
        parser.error("--repack yes keeps a copy of the weights, so they must stay too: give --folder DIR")
    return args


def measure(args: Namespace, folder: Path) -> dict[str, Any]:
    """The report: all that is printed, as one object."""
    raw = random_model.config(args.config)
    own = fitting(args, raw, folder)
    full = random_model.smaller(raw, raw["num_hidden_layers"], args.experts, args.vocabulary)
    nbytes, start = random_model.nbytes(own), time.perf_counter()
    with Progress(nbytes, "writing random weights") as progress:
        random_model.write(own, folder, progress)
    made = time.perf_counter() - start
    bench = Bench(own, full, folder, args)
    rows = []
    for row in bench.rows():
        share = row.predicted and (
            row.predicted / row.measured if row.unit == "s" else row.measured / row.predicted
        )
        rows.append(row._asdict() | {"share": share})
    gpu = ""
    if bench.backend == "cuda" and ops.sees_gpu():
        import torch  # heavy and optional: the extra `gpu`

        gpu = torch.cuda.get_device_name(0)
    return {
        "config": args.config,
        "weights": "random",
        "layers": own["num_hidden_layers"],
        "layers_full": full["num_hidden_layers"],
        "dense_layers": own["first_k_dense_replace"],
        "experts": own["n_routed_experts"],
        "nbytes": nbytes,
        "made_s": made,
        "backend": bench.backend,
        "activations": args.activations,
        "repack": {
            "choice": args.repack,
            "nbytes": bench.copy.new_bytes if bench.copy else 0,
            "kept": bench.copy is not None and not bench.copy.new_bytes,
        },
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "gbps": bench.machine.gbps,
        "gflops": bench.machine.gflops,
        "rows": rows,
        "breakdown": bench.breakdown(),
        "threads": steps.threads_found(),
        "processors": _processors(bench.taken),
    }


def _processors(taken: list[processors.Taken]) -> dict[str, Any]:
    """What this process may use of CPUs, and what it had while tokens were decoded: CPUs that it kept busy,
    how often and how long its group was throttled, the share of all CPU time that the host took.
    """
    cpus = len(processors.affinity())
    found = {"cpus": cpus, "cores": processors.cores(), "quota": processors.quota()}
    if not taken:
        return found
    whole = processors.Taken._make(map(sum, zip(*taken)))
    seconds = max(whole.seconds, 1e-9)
    return found | {
        "busy": whole.own_s / seconds,
        "throttled": whole.throttled,
        "throttled_s": whole.throttled_s,
        "stolen": whole.steal_s / seconds / (os.cpu_count() or 1),
        "switches_s": whole.switches / seconds,
    }


def _says_of_threads(report: dict[str, Any]) -> Iterator[str]:
    """How many were found for a token, and what may have held them up."""
    p = report["processors"]
    if report["threads"]:
        number, most, tried = report["threads"]
        so_far = "" if tried else ", so far"
        yield f"threads for a token: {number} of {most}, the fastest that was found{so_far}"
    quota = "no quota" if p["quota"] is None else f"a quota of {p['quota']:.2g}"
    yield f"CPUs: {p['cpus']}, on {p['cores']} cores, {quota}"
    if "busy" in p:
        yield (
            f"while decoding: {p['busy']:.1f} of them busy, throttled {p['throttled']} times for "
            f"{p['throttled_s']:.1f} s, {p['stolen']:.1%} stolen by the host, "
            f"{p['switches_s']:.0f} times a second a thread lost its CPU to another"
        )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench system` with these arguments."""
    args = _arguments(argv)
    with _folder(args.folder) as folder:
        report = measure(args, folder)
    print(to_json(report) if args.json else "\n".join(show(report)))
    if args.draw:
        draw(report, args.draw, force=args.force)
