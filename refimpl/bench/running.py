"""A loaded model that is measured as it runs, each figure beside its prediction, and taken apart: the middle
of `refimpl.bench system`.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import refimpl
from refimpl import ops, plan
from refimpl.bench import random_model
from refimpl.bench.resident import resident
from refimpl.bench.watch import Watch, gpu_seconds
from refimpl.config import DeepSeekConfig
from refimpl.devices import memory, placement, speed, steps
from refimpl.errors import refusal
from refimpl.generate import Session
from refimpl.kernels import processors
from refimpl.loading import interleaving

CONTEXTS, PROMPTS, FIRST = (500, 4000), (32, 256, 1024), 8
ROUNDS, TOKENS = 5, 3  # at each context: readings of memory in turns with tokens, after one that is not timed
FINDING, FINDING_S = 400, 60.0  # tokens and seconds, at most, in which the number of threads is found


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
    reading: float | None = None  # GB/s of memory between the tokens, which `predicted` is made from


class Machine(NamedTuple):
    """What was measured first, as `refimpl.plan` takes it."""

    gbps: dict[str, float]  # "cpu", "cores", "cuda", "upload"
    gflops: dict[str, float]  # "cpu", "floats", "cuda"


# --- measuring ----------------------------------------------------------------------------------------------


class Bench:
    """A loaded model, and the configs that predictions are made from: its own and that of all layers."""

    def __init__(self, raw: dict[str, Any], full: dict[str, Any], folder: Path, args: Namespace):
        self.inventories = [random_model.inventory(r) for r in (raw, full)]
        self.backend = ops.best_backend() if args.backend == "auto" else args.backend
        self.args, self.rng = args, np.random.default_rng(0)
        self.own = not args.threads  # threads are the kernels' own choice
        self.threads = args.threads or [ops.own_threads()]
        self.taken: list[processors.Taken] = []  # while tokens were decoded
        self.places = [self._place(s.config) for s in self.inventories]
        self.copies = [interleaving.cost_of(s) for s in self.inventories]
        expected = interleaving.pays(self.backend, args.activations) and interleaving.is_made(
            args.repack, self.copies[0], memory.free_ram()
        )
        self.machine = self._measure_machine(expected)
        say("loading")
        rules = args.optimize_config_path if self.backend == "cuda" else None
        self.resident, start = resident(), time.perf_counter()
        threads = None if self.own else self.threads[0]
        self.model = refimpl.load(folder, self.backend, rules, args.activations, threads, args.repack)
        self.load_s = time.perf_counter() - start
        # As loading made or found it; None where experts stay as the files have them.
        checkpoint = self.model.checkpoint
        self.copy = checkpoint if isinstance(checkpoint, interleaving.InterleavedExperts) else None
        if expected != (self.copy is not None):  # a copy was kept, or memory ran short meanwhile
            self.machine = self._measure_machine(not expected)
        self.watch = Watch(self.model, self.backend != "cuda")

    def _place(self, config: DeepSeekConfig) -> Callable[[str], str]:
        """Where the modules of a model of that config are: rules name the layers of one model."""
        if self.backend != "cuda":
            return lambda module: "cpu"
        return placement.load(self.args.optimize_config_path or placement.HYBRID, config)

    def _measure_machine(self, repack: bool) -> Machine:
        """With the experts' rows side by side, or as files have them."""
        say("measuring bandwidths")
        c, threads, types = (
            self.inventories[0].config,
            self.threads[0],
            plan.expert_types(self.inventories[0]),
        )
        assert types
        ops.set_threads(threads)
        rates = speed.expert_rates(threads, types, c.hidden_size, c.moe_intermediate_size, repack)
        gbps = {"cpu": speed.read_bandwidth(threads), "cores": rates.core_gbps * threads}
        gflops = {"cpu": rates.gflops, "floats": speed.float_rate(threads)}
        self._set_threads(threads)
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
        if self.copy is not None and self.copy.new_bytes:
            yield self._row("rearranging", None, [self.copy.seconds], [c.seconds for c in self.copies])
        yield self._first()
        contexts = self._fitting(self.args.context or CONTEXTS)
        if self.own:
            self._find_threads(contexts[0])
        for threads in self.threads:
            for context in contexts:
                yield self._decode(context, threads)
        self._set_threads(self.threads[0])
        for prompt in self._fitting(self.args.tokens or PROMPTS):
            yield self._prefill(prompt)
        yield from self._memory()

    def _set_threads(self, threads: int) -> None:
        if not self.own:
            ops.set_threads(threads)
        elif steps.threads_found() is None:  # measuring the machine has set some
            ops.own_threads()

    def _find_threads(self, context: int) -> None:
        """Decode until the number of threads is found, so that what is timed is what most tokens take."""
        say("finding how many threads are fastest for a token")
        step, end = self._stepper(context), time.perf_counter() + FINDING_S
        for _ in range(FINDING):
            step()
            found = steps.threads_found()
            if found is None or found[2] or time.perf_counter() > end:
                return

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
        """One row of the report, from measured and predicted seconds; it is a rate where `tokens` were made
        in them.
        """
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
        mode, prefill = self.args.activations, self.model.backend.prefill
        return [
            memory.items(s, place, context, mode, prefill) for s, place in zip(self.inventories, self.places)
        ]

    def _loading(self) -> Row:
        """All of it, beside the time to bring the GPU its weights and to rearrange experts; on the CPU other
        weights stay in the mapped files.
        """
        found = None
        if "upload" in self.machine.gbps:
            weights = [
                memory.weights(s, place, self.args.activations)
                for s, place in zip(self.inventories, self.places)
            ]
            upload = self.machine.gbps["upload"] * 1e9
            found = [sum(p.nbytes for p in w if p.device != "cpu") / upload for w in weights]
        if self.copy is not None and self.copy.new_bytes:
            found = [s + c.seconds for s, c in zip(found or (0.0, 0.0), self.copies)]
        return self._row("loading", None, [self.load_s], found)

    def _first(self) -> Row:
        """The row for a short prompt in a process that has computed nothing: compiling and first touch."""
        say(f"first token, of a prompt of {FIRST}")
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
        machine, prefill = self.machine, self.model.backend.prefill
        return [
            plan.together(plan.prefill_seconds(s.config, parts, tokens, *machine, prefill))
            for s, parts in zip(self.inventories, self._parts(tokens))
        ]

    def _prefill(self, tokens: int) -> Row:
        say(f"a prompt of {tokens} tokens, the second of two")
        self._prompt(tokens)
        return self._row("prefill", tokens, [self._prompt(tokens)], self._predicted_prompt(tokens), tokens)

    def _decode(self, context: int, threads: int) -> Row:
        say(f"decoding behind {context} tokens, {threads} threads")
        step = self._stepper(context)
        times, gbps = self._beside_reading(lambda: self._times(step), threads, ROUNDS)
        gbps["cores"] *= threads / self.threads[0]
        predicted = [plan.decode_seconds(parts, gbps) for parts in self._parts(context + 1)]
        found = steps.threads_found()
        row = self._row("decode", context, list(chain(*times)), predicted, 1, found[0] if found else threads)
        return row._replace(reading=gbps["cpu"])

    def _beside_reading(
        self, job: Callable[[], Any], threads: int, rounds: int = 1
    ) -> tuple[list[Any], dict[str, float]]:
        """What a job gives each time, and the machine's rates, with that of reading memory as it is before,
        between and after: on a machine that is shared it changes from second to second.
        """
        reading = speed.Reading(threads)
        results, gbps = [], [reading.gbps()]
        for _ in range(rounds):
            time.sleep(speed.REST_S)
            self._set_threads(threads)
            results.append(job())
            gbps.append(reading.gbps())
        return results, self.machine.gbps | {"cpu": float(np.median(gbps))}

    def _times(self, step: Callable[[], float]) -> list[float]:
        """Seconds of tokens, after one for which threads have to wake."""
        step()
        before = processors.taken()
        times = [step() for _ in range(TOKENS)]
        self.taken.append(processors.taken().since(before))
        return times

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
        if self.copy is not None and self.copy.new_bytes:  # the files' pages stay as long as there is room
            for total, cost in zip((here, full), self.copies):
                total["cpu"] += cost.nbytes
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
        say("taking a token and a prompt apart")
        step = self._stepper(context)
        step()
        step()
        (token,), gbps = self._beside_reading(lambda: self._apart(step, ROUNDS * TOKENS), self.threads[0])
        token["predicted"] = self._milliseconds(plan.part_seconds(self._parts(context + 1)[0], gbps))
        whole = self._apart(partial(self._prompt, prompt), 1)
        c = self.inventories[0].config
        at_a_time = self.model.backend.prefill
        parts = plan.prefill_seconds(c, self._parts(prompt)[0], prompt, *self.machine, at_a_time)
        whole["predicted"] = self._milliseconds(parts)
        return {f"token behind {context}": token, f"prompt of {prompt}": whole}

    def _apart(self, job: Callable[[], float], count: int) -> dict[str, Any]:
        """Milliseconds of a call and of its parts, which add up to it; means of some calls."""
        mean = lambda: float(np.mean([job() for _ in range(count)]))  # noqa: E731
        self.watch.clear()
        whole = mean()
        parts = {k: v / count for k, v in self.watch.found().items()}
        if self.backend == "cuda":
            parts |= self._beside_experts(mean, count)
        parts["rest" if self.backend != "cuda" else "waiting"] = whole - sum(parts.values())
        return {"ms": whole * 1e3, "parts": {k: v * 1e3 for k, v in parts.items()}}

    def _beside_experts(self, mean: Callable[[], float], count: int) -> dict[str, float]:
        """Seconds of GPU, transfers and Python, from calls whose experts return at once."""
        self.watch.without_experts(True)
        try:
            whole = mean()
            record = gpu_seconds(mean) if ops.sees_gpu() else None
        finally:
            self.watch.without_experts(False)
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


def say(what: str) -> None:
    """What is going on, for who waits."""
    print(f"refimpl: {what}", file=sys.stderr, flush=True)
