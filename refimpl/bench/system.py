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
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import refimpl
from refimpl import ops, plan
from refimpl.bench import random_model
from refimpl.bench.resident import resident
from refimpl.cli import Parser, Progress, size
from refimpl.devices import memory, placement, speed
from refimpl.errors import refusal
from refimpl.generate import Session

CONTEXTS, PROMPTS, FIRST = (500, 4000), (32, 256, 1024), 8
TOKENS = 12  # timed at each context, after three that are not
SPARE = 0.85  # of what is free


class Row(NamedTuple):
    """A figure beside its prediction: seconds of a call, or bytes. `extrapolated` is for all layers."""

    what: str
    at: int | None  # tokens of context or prompt
    threads: int
    measured: float
    spread: float  # of the calls, quartiles relative to the median; 0 of one call
    predicted: float | None
    extrapolated: float | None
    predicted_full: float | None
    unit: str  # "s", "tokens/s", "B"


class Machine(NamedTuple):
    """What was measured first, as `refimpl.plan` takes it."""

    gbps: dict[str, float]  # "cpu", "cores", "cuda", "upload"
    gflops: dict[str, float]  # "cpu", "cuda"


# --- what is watched in a running model ---------------------------------------------------------------------


class Watch:
    """Stands in for parts of a running model and adds up their seconds. With `skip` experts return zeros at
    once.
    """

    def __init__(self, model: Any, parts: bool):
        self.seconds: dict[str, float] = {}
        self.skip = False
        for layer in model.layers:
            routed = hasattr(layer.mlp, "experts")
            if routed:
                self._watch_experts(layer.mlp)
            if parts:  # on a GPU these are called while a graph is captured, and then no more
                self._watch(layer, "self_attn", "attention")
                if routed:
                    self._watch(layer.mlp, "shared_experts", "shared expert")
                else:
                    self._watch(layer, "mlp", "dense MLP")

    def _watch(self, owner: Any, name: str, part: str) -> None:
        if getattr(owner, name) is not None:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _watch_experts(self, mlp: Any) -> None:
        """The function itself, which runs in the experts' thread, or in the object that launches it there."""
        holder, name = (mlp.experts, "function") if hasattr(mlp.experts, "function") else (mlp, "experts")
        timed = self._timed("experts", getattr(holder, name))

        def experts(x: np.ndarray, *args: Any, **named: Any) -> np.ndarray:
            return np.zeros(x.shape, np.float32) if self.skip else timed(x, *args, **named)

        setattr(holder, name, experts)

    def _timed(self, part: str, function: Callable) -> Callable:
        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        return timed


def gpu_seconds(job: Callable[[], Any]) -> dict[str, float] | None:
    """Seconds of kernels and of copies between host and GPU in a call, by the driver's record; None where it
    keeps none.
    """
    from torch.autograd import DeviceType  # heavy and optional: the extra `gpu`
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        job()
    found = {"GPU": 0.0, "transfers": 0.0}
    for event in record.events():
        if event.device_type == DeviceType.CUDA:
            crosses = "HtoD" in event.name or "DtoH" in event.name
            found["transfers" if crosses else "GPU"] += event.time_range.elapsed_us() / 1e6
    return found if found["GPU"] else None


# --- measuring ----------------------------------------------------------------------------------------------


class Bench:
    """A loaded model, and the configs that predictions are made from: its own and that of all layers."""

    def __init__(self, raw: dict[str, Any], full: dict[str, Any], folder: Path, args: Namespace):
        self.inventories = [random_model.inventory(r) for r in (raw, full)]
        self.backend = ops.best_backend() if args.backend == "auto" else args.backend
        self.args, self.rng = args, np.random.default_rng(0)
        self.threads = args.threads or [_default_threads()]
        self.place: Callable[[str], str] = lambda module: "cpu"
        if self.backend == "cuda":
            self.place = placement.load(
                args.optimize_config_path or placement.HYBRID, self.inventories[0].config
            )
        self.machine = self._measure_machine()
        _say("loading")
        rules = args.optimize_config_path if self.backend == "cuda" else None
        self.resident, start = resident(), time.perf_counter()
        self.model = refimpl.load(folder, self.backend, rules, args.activations, self.threads[0])
        self.load_s = time.perf_counter() - start
        self.watch = Watch(self.model, self.backend != "cuda")

    def _measure_machine(self) -> Machine:
        _say("measuring bandwidths")
        c, threads, types = (
            self.inventories[0].config,
            self.threads[0],
            plan.expert_types(self.inventories[0]),
        )
        assert types
        ops.set_threads(threads)
        rates = speed.expert_rates(threads, types, c.hidden_size, c.moe_intermediate_size)
        gbps = {"cpu": speed.read_bandwidth(threads), "cores": rates.core_gbps * threads}
        gflops = {"cpu": rates.gflops}
        if self.backend == "cuda" and not ops.sees_gpu():  # on CPU tensors, as tests do
            gbps["cuda"], gflops["cuda"] = gbps["cpu"], rates.gflops
        elif self.backend == "cuda":
            from refimpl.bench.fp8 import measure_limits  # a GPU's

            limits = measure_limits()
            gbps |= {"cuda": limits.bytes_s / 1e9, "upload": speed.upload_bandwidth()}
            gflops["cuda"] = limits.flops_s / 1e9
            import torch  # it is there, a GPU has been seen

            torch.cuda.empty_cache()  # what was measured with is not the model's
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        return Machine(gbps, gflops)

    def rows(self) -> Iterator[Row]:
        """All figures, one by one."""
        yield self._loading()
        yield self._first()
        for threads in self.threads:
            ops.set_threads(threads)
            for context in self._fitting(self.args.context or CONTEXTS):
                yield self._decode(context, threads)
        ops.set_threads(self.threads[0])
        for prompt in self._fitting(self.args.tokens or PROMPTS):
            yield self._prefill(prompt)
        yield from self._memory()

    def _fitting(self, lengths: Any) -> list[int]:
        limit = self.inventories[0].config.max_position_embeddings - 1
        return sorted({min(n, limit) for n in lengths})

    def _row(
        self,
        what: str,
        at: int | None,
        seconds: list[float],
        predicted: list[float] | None,
        tokens: int = 0,
        threads: int = 0,
    ) -> Row:
        """Of measured and predicted seconds; as a rate where `tokens` were made in them."""
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        times: list[float | None] = [float(median), None, None, None]
        if predicted is not None:
            times = [float(median), predicted[0], median * predicted[1] / predicted[0], predicted[1]]
        if tokens:
            times = [None if t is None else tokens / t for t in times]
        measured, bound, extrapolated, bound_full = times
        assert measured is not None
        return Row(
            what,
            at,
            threads or self.threads[0],
            measured,
            float((high - low) / median),
            bound,
            extrapolated,
            bound_full,
            "tokens/s" if tokens else "s",
        )

    def _parts(self, context: int) -> list[list[memory.MemoryItem]]:
        return [memory.items(s, self.place, context, self.args.activations) for s in self.inventories]

    def _loading(self) -> Row:
        """Beside the time to bring the GPU its weights; on the CPU they stay in the mapped files."""
        found = None
        if "upload" in self.machine.gbps:
            weights = [memory.weights(s, self.place, self.args.activations) for s in self.inventories]
            upload = self.machine.gbps["upload"] * 1e9
            found = [sum(p.nbytes for p in w if p.device != "cpu") / upload for w in weights]
        return self._row("loading", None, [self.load_s], found)

    def _first(self) -> Row:
        """Of a short prompt, in a process that has computed nothing: compiling and first touch."""
        _say(f"first token, of a prompt of {FIRST}")
        row = self._row("first token", FIRST, [self._prompt(FIRST)], self._predicted_prompt(FIRST))
        return row._replace(extrapolated=None)  # compiling takes as long for any number of layers

    def _prompt(self, tokens: int) -> float:
        ids = self._ids(tokens)
        start = time.perf_counter()
        logits = Session(self.model).prefill(ids)
        seconds = time.perf_counter() - start
        if not np.isfinite(logits).all():
            raise refusal("E4040", "random weights", found="NaN or infinity")
        return seconds

    def _ids(self, tokens: int) -> list[int]:
        return self.rng.integers(0, self.inventories[0].config.vocab_size, tokens).tolist()

    def _predicted_prompt(self, tokens: int) -> list[float]:
        machine = self.machine
        return [
            plan.together(plan.prefill_seconds(s.config, parts, tokens, machine.gbps, machine.gflops))
            for s, parts in zip(self.inventories, self._parts(tokens))
        ]

    def _prefill(self, tokens: int) -> Row:
        _say(f"a prompt of {tokens} tokens, the second of two")
        self._prompt(tokens)
        return self._row("prefill", tokens, [self._prompt(tokens)], self._predicted_prompt(tokens), tokens)

    def _decode(self, context: int, threads: int) -> Row:
        _say(f"decoding behind {context} tokens, {threads} threads")
        gbps = self.machine.gbps | {"cores": self.machine.gbps["cores"] / self.threads[0] * threads}
        predicted = [plan.decode_seconds(parts, gbps) for parts in self._parts(context + 1)]
        return self._row("decode", context, self._times(context), predicted, 1, threads)

    def _times(self, context: int) -> list[float]:
        """Seconds of tokens, after three that are not counted."""
        step = self._stepper(context)
        return [step() for _ in range(TOKENS + 3)][3:]

    def _stepper(self, context: int) -> Callable[[], float]:
        """What decodes one token behind so many, the same cache each time, and gives its seconds."""
        cache = self._filled(context)

        def step() -> float:
            ids = self._ids(1)
            start = time.perf_counter()
            self.model.forward(ids, cache, last_only=True)
            seconds = time.perf_counter() - start
            cache.truncate(context)
            return seconds

        return step

    def _filled(self, context: int) -> Any:
        """A cache with so many random rows, and room for one more."""
        c, cache = self.inventories[0].config, self.model.new_cache()
        cache.reserve(context + 1)
        rows: Any = (
            self.rng.standard_normal((context, c.kv_lora_rank), np.float32),
            self.rng.standard_normal((context, c.qk_rope_head_dim), np.float32),
        )
        if self.backend == "cuda":
            import torch  # heavy and optional: the extra `gpu`

            rows = [torch.from_numpy(r) for r in rows]
        for layer in range(c.num_hidden_layers):
            cache.extend(layer, *rows)
        cache.advance(context)
        return cache

    def _memory(self) -> Iterator[Row]:
        longest = max(
            *self._fitting(self.args.context or CONTEXTS), *self._fitting(self.args.tokens or PROMPTS)
        )
        held = {"cpu": resident() - self.resident}
        if self.backend == "cuda" and ops.sees_gpu():
            import torch  # heavy and optional: the extra `gpu`

            held |= {
                f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())
            }
        here, full = (memory.totals(parts) for parts in self._parts(longest + 1))
        for device, nbytes in held.items():
            if device in here:
                what, more = "RAM" if device == "cpu" else f"VRAM {device}", full[device] - here[device]
                sizes = (float(nbytes), 0.0, float(here[device]), float(nbytes + more), float(full[device]))
                yield Row(what, None, self.threads[0], *sizes, "B")

    # --- taking apart ---

    def breakdown(self) -> dict[str, dict[str, Any]]:
        """A token behind the shortest context and the longest prompt: milliseconds by part, and what the plan
        says of experts and GPU.
        """
        context = self._fitting(self.args.context or CONTEXTS)[0]
        prompt = self._fitting(self.args.tokens or PROMPTS)[-1]
        _say("taking a token and a prompt apart")
        step = self._stepper(context)
        step()
        step()
        token = self._apart(step, TOKENS)
        gbps, gflops = self.machine
        token["predicted"] = self._milliseconds(plan.part_seconds(self._parts(context + 1)[0], gbps))
        whole = self._apart(partial(self._prompt, prompt), 1)
        c = self.inventories[0].config
        parts = plan.prefill_seconds(c, self._parts(prompt)[0], prompt, gbps, gflops)
        whole["predicted"] = self._milliseconds(parts)
        return {f"token behind {context}": token, f"prompt of {prompt}": whole}

    def _apart(self, job: Callable[[], float], count: int) -> dict[str, Any]:
        """Milliseconds of a call and of its parts, which add up to it; means of some calls."""
        mean = lambda: float(np.mean([job() for _ in range(count)]))  # noqa: E731
        self.watch.seconds.clear()
        whole = mean()
        parts = {k: v / count for k, v in self.watch.seconds.items()}
        if self.backend == "cuda":
            parts |= self._beside_experts(mean, count)
        parts["rest" if self.backend != "cuda" else "waiting"] = whole - sum(parts.values())
        return {"ms": whole * 1e3, "parts": {k: v * 1e3 for k, v in parts.items()}}

    def _beside_experts(self, mean: Callable[[], float], count: int) -> dict[str, float]:
        """Seconds of GPU, transfers and Python, from calls whose experts return at once."""
        self.watch.skip = True
        try:
            whole = mean()
            record = gpu_seconds(mean) if ops.sees_gpu() else None
        finally:
            self.watch.skip = False
        if record is None:
            return {"GPU, transfers and Python": whole}
        parts = {k: v / count for k, v in record.items()}
        return parts | {"Python": whole - sum(parts.values())}

    def _milliseconds(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Predictions under the names of what is measured."""
        labels, other = {"routed experts": "experts", "embedding": "Python"}, "GPU"
        if self.backend != "cuda":
            labels = {"routed experts": "experts", "kv_b": "attention", "latent cache": "attention"}
            labels |= {name: name for name in ("attention", "dense MLP", "shared expert")}
            other = "rest"
        found: dict[str, float] = {}
        for name, seconds in parts.items():
            label = labels.get(name, other)
            found[label] = found.get(label, 0.0) + seconds * 1e3
        return found


def _default_threads() -> int:
    from refimpl.kernels import linear_numba  # Numba: seconds

    return linear_numba.threads()


# --- what fits ----------------------------------------------------------------------------------------------


def fitting(args: Namespace, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the layers that are asked for, or as many as there is room for in files, RAM and VRAM.
    ResourceError E5102 where they do not fit.
    """
    held = sum(f.stat().st_size for f in folder.glob("model-*.safetensors"))  # used again, or replaced
    free = memory.free_memory()
    files = shutil.disk_usage(folder).free + held
    room = files if args.layers else SPARE * min(files, free["cpu"] + held)
    for layers in [args.layers] if args.layers else range(raw["num_hidden_layers"], 1, -1):
        found = random_model.smaller(raw, layers, args.experts, args.vocabulary)
        need = random_model.nbytes(found)
        if need <= room and (args.layers or _fits_gpus(found, free, args)):
            return found
    raise refusal("E5102 another", folder, found=f"{size(room)} free", expected=size(need))


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


def _say(what: str) -> None:
    print(f"refimpl: {what}", file=sys.stderr, flush=True)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return size(value) if unit == "B" else f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"


def show(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines for people."""
    here, full = report["layers"], report["layers_full"]
    yield (
        f"{report['config']}, RANDOM weights, {here} of {full} layers "
        f"({report['dense_layers']} dense), {report['experts']} experts, {size(report['nbytes'])} in files"
    )
    yield f"{report['cpu']}, {report['cores']} cores{', ' + report['gpu'] if report['gpu'] else ''}"
    yield f"backend {report['backend']}, activations {report['activations']}"
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
        yield line
    for what, apart in report["breakdown"].items():
        yield ""
        yield f"{what}: {apart['ms']:.2f} ms"
        for part in dict.fromkeys([*apart["parts"], *apart["predicted"]]):
            ms, bound = apart["parts"].get(part), apart["predicted"].get(part)
            told = f"{ms:10.2f} ms {ms / apart['ms']:5.0%}" if ms is not None else f"{'':19}"
            yield f"  {part:26}{told}" + (f"   plan {bound:.2f} ms" if bound is not None else "")


def _arguments(argv: list[str]) -> Namespace:
    parser = Parser("python -m refimpl.bench system", __doc__)
    parser.add_argument(
        "--config", default="deepseek-v3", help="whose shape: deepseek-v3, or tiny, the embedded model's"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="two or more (default: as many as fit)")
    parser.add_argument("--experts", type=int, metavar="N", help="in a layer (default: the config's)")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="tokens known (default: the config's)")
    parser.add_argument(
        "--tokens",
        type=int,
        action="append",
        metavar="N",
        help=f"length of a prompt, may be repeated (default {PROMPTS})",
    )
    parser.add_argument(
        "--context",
        type=int,
        action="append",
        metavar="N",
        help=f"tokens before those that are decoded, may be repeated (default {CONTEXTS})",
    )
    parser.add_argument("--backend", default="auto", choices=("auto", *ops.BACKENDS))
    parser.add_argument(
        "--optimize_config_path", metavar="RULES.yaml", help="placement rules, of several GPUs for example"
    )
    parser.add_argument("--activations", default="fp8", choices=("fp8", "exact"))
    parser.add_argument(
        "--threads",
        type=int,
        action="append",
        metavar="N",
        help="may be repeated: the others only decode (default: what the kernels take by themselves)",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="for the files, kept and used again (default: in memory)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    for name, least in (("layers", 2), ("experts", 2), ("vocabulary", 2)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if min([1, *(args.tokens or ()), *(args.threads or ())]) < 1 or min([2, *(args.context or ())]) < 2:
        parser.error("--tokens and --threads must be at least 1, --context at least 2")
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
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "gbps": bench.machine.gbps,
        "gflops": bench.machine.gflops,
        "rows": rows,
        "breakdown": bench.breakdown(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main(argv: list[str]) -> None:
    """The command."""
    args = _arguments(argv)
    with _folder(args.folder) as folder:
        report = measure(args, folder)
    print(json.dumps(report) if args.json else "\n".join(show(report)))
