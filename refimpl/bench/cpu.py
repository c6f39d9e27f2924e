"""Routed experts and linears on the CPU: `python -m refimpl.bench experts linear`.

Equality with the reference comes first. Then all contenders take turns on the same bytes in one process, and
the median and the spread (from the first to the third quartile, relative to the median) of each are printed.
`limit` is what plain reading of memory reaches in the same run with as many threads. Compare figures of one
run only: a shared machine moves by half between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from refimpl import ops
from refimpl.bench import peers
from refimpl.bench.measure import OURS, SHAPES, Row, Settings, require_close, rows
from refimpl.devices.speed import Job, race, random_weights, read_bandwidth
from refimpl.formats import bf16
from refimpl.reference import fp8, interleaved, linear, packed
from refimpl.tensors import Packed, ScaledFP8, Stack

TOKENS = (1, 4, 16, 32, 128)
MIXES = {  # gate and up, down
    "Q4_K": ("Q4_K", "Q4_K"),
    "Q4_K+Q6_K": ("Q4_K", "Q6_K"),
    "MXFP4": ("MXFP4", "MXFP4"),
    "IQ4_XS": ("IQ4_XS", "IQ4_XS"),
}
ExpertMatrices = tuple[Packed, Packed, Packed]  # gate, up, down


def experts(given: Settings) -> Iterator[Row]:
    """A layer's routed experts for M tokens, routed anew each round."""
    hidden, width, count, _ = SHAPES[given.shape]
    for mix in given.mixes or MIXES:
        first, last = MIXES[mix]
        matrices = (
            random_weights(first, count, width, hidden),
            random_weights(first, count, width, hidden),
            random_weights(last, count, hidden, width),
        )
        beside = [interleaved.where_possible(w) for w in matrices]
        other = beside if any(w is not b for w, b in zip(matrices, beside)) else None
        for m in given.tokens:
            yield from _experts(f"experts {mix} M={m}", m, given, matrices, other)


def _experts(
    name: str, m: int, given: Settings, matrices: ExpertMatrices, beside: Sequence[Stack] | None
) -> Iterator[Row]:
    chosen = SHAPES[given.shape][3]
    rng, count = np.random.default_rng(1), len(matrices[0].data)
    x = rng.standard_normal((m, matrices[0].shape[2])).astype(np.float32)
    weights = np.full((m, chosen), 1 / chosen, np.float32)
    # One routing a round, the same for all: each contender walks through the list at its own pace.
    routings = [np.argsort(rng.random((m, count)), axis=1)[:, :chosen] for _ in range(64)]
    touched = (
        float(np.mean([len(np.unique(r)) for r in routings])) * sum(s.data.nbytes for s in matrices) / count
    )
    calls: dict[str, int] = {}

    def routing(who: str) -> np.ndarray:
        calls[who] = calls.get(who, -1) + 1
        return routings[calls[who] % len(routings)]

    ours = ops.load("experts", "cpu")
    few, true = min(m, 2), ours(x, routings[0], weights, *matrices)
    require_close(
        f"{name} cpu",
        true[:few],
        ops.OPS["experts"].reference(x[:few], routings[0][:few], weights[:few], *matrices),
        2e-2,
    )
    jobs: dict[str, Job] = {"cpu": lambda: ours(x, routing("cpu"), weights, *matrices)}
    if beside is not None:
        require_close(f"{name} {OURS[1]}", ours(x, routings[0], weights, *beside), true, 2e-2)
        jobs[OURS[1]] = lambda: ours(x, routing(OURS[1]), weights, *beside)
    if m == 1 and (given.shape == "tiny" or not given.peers):  # seconds on the larger shape
        jobs["reference"] = lambda: ops.OPS["experts"].reference(x, routing("reference"), weights, *matrices)
    graphs = {}
    if given.peers:
        for label, repack in (("ggml plain", False), ("ggml 8x8", True)):
            if repack and m * chosen > 8 * count:
                continue  # it falls to half of plain there, and lasts minutes
            graphs[label] = peers.Graph(given.threads, repack).experts(*matrices, m, chosen)
            require_close(
                f"{name} {label}", graphs[label](x, routings[0].astype(np.int32)).mean(axis=1), true, 2e-2
            )
            jobs[label] = partial(lambda g, who: g(x, routing(who).astype(np.int32)), graphs[label], label)
        for label, make in (
            ("kt-kernel", peers.kt_experts if given.kt and given.threads == 1 else None),
            ("torch bf16", _torch_experts if m >= 512 else None),
        ):
            run_it = make(given.threads, m, chosen, matrices) if make else None
            if run_it:
                require_close(f"{name} {label}", run_it(x, routings[0], weights), true, 5e-2)
                jobs[label] = partial(lambda f, who: f(x, routing(who), weights), run_it, label)
    flops = 6.0 * m * chosen * matrices[0].shape[1] * matrices[0].shape[2]
    times, limit = race(jobs, given.seconds), read_bandwidth(given.threads)
    yield from rows(name, given.shape, given.threads, times, touched, flops, limit)
    for graph in graphs.values():
        graph.close()


def _torch_experts(threads: int, tokens: int, chosen: int, matrices: ExpertMatrices) -> Callable | None:
    """The experts in torch with weights dequantized to bfloat16, 3.6 times the memory, where torch is
    installed.
    """
    with suppress(ImportError):
        import torch  # optional: a peer

        torch.set_num_threads(threads)
        gate, up, down = (
            [torch.from_numpy(packed.dense(side.expert(e))).to(torch.bfloat16) for e in range(len(side.data))]
            for side in matrices
        )

        def run_it(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
            t, out = torch.from_numpy(x).to(torch.bfloat16), torch.zeros(x.shape)
            for e in np.unique(ids):
                token, slot = np.nonzero(ids == e)
                own = t[torch.from_numpy(token)]
                hidden = torch.nn.functional.silu(own @ gate[e].T) * (own @ up[e].T)
                out.index_add_(
                    0,
                    torch.from_numpy(token),
                    (hidden @ down[e].T).float() * torch.from_numpy(weights[token, slot, None]),
                )
            return out.numpy()

        return run_it
    return None


def linears(given: Settings) -> Iterator[Row]:
    """Layers of several times the last-level cache, taken in turns: FP8 tiles (W8A8), BF16, and Q4_K; of one
    size, or of each that is asked for.
    """
    hidden, width = SHAPES[given.shape][:2]
    for n, k in given.matrices or [(width, hidden)]:
        copies = max(1, -(-LAYERS // (n * k))) if given.matrices else 8 if given.shape == "v3" else 1
        size = f" {n}x{k}" if given.matrices else ""
        for kind in given.kinds or USUAL:
            layers = KINDS[kind](copies, n, k)
            for m in given.tokens:
                yield from _linear(f"linear {kind}{size} M={m}", m, given, layers)


LAYERS = 117_440_512  # weights in all copies of a matrix, as in eight of 2,048 x 7,168


def _fp8_layers(copies: int, n: int, k: int) -> list[ScaledFP8]:
    rng = np.random.default_rng(2)
    few = fp8.weight_quant(rng.standard_normal((128, 1024)).astype(np.float32)).codes.reshape(-1)
    codes = rng.choice(few, (copies, n, k))
    scale = np.full((-(-n // 128), -(-k // 128)), 1e-4, np.float32)
    return [ScaledFP8(c, scale) for c in codes]


def _bf16_layers(copies: int, n: int, k: int) -> list[Packed]:
    w = np.random.default_rng(2).standard_normal((copies * n, k)).astype(np.float32) * np.float32(0.02)
    return [Packed(h, bf16.GGML_TYPE, (n, k)) for h in bf16.quantize(w).reshape(copies, n, -1)]


def _quantized_layers(kind: str, copies: int, n: int, k: int) -> list[Packed]:
    stack = random_weights(kind, copies, n, k)
    return [stack.expert(i) for i in range(copies)]


KINDS: dict[str, Callable[[int, int, int], list]] = {
    "FP8": _fp8_layers,
    "BF16": _bf16_layers,
    "Q4_K": partial(_quantized_layers, "Q4_K"),
    "Q6_K": partial(_quantized_layers, "Q6_K"),
}
USUAL = ("FP8", "BF16", "Q4_K")  # where none are named


def _linear(name: str, m: int, given: Settings, layers: list) -> Iterator[Row]:
    first = layers[0]
    rows_, columns = first.shape
    x = np.random.default_rng(3).standard_normal((m, columns)).astype(np.float32)
    ours = ops.load("linear", "cpu")
    true = linear.linear(x[:2], first)
    require_close(f"{name} cpu", ours(x, first)[:2], true, 1e-4)
    jobs: dict[str, Job] = {"cpu": lambda: [ours(x, w) for w in layers]}
    beside = [interleaved.where_possible(w) for w in layers]
    if beside[0] is not first:
        require_close(f"{name} {OURS[1]}", ours(x, beside[0])[:2], true, 1e-4)
        jobs[OURS[1]] = lambda: [ours(x, w) for w in beside]
    graphs = []
    if given.peers:
        jobs |= _torch_linears(x, layers, name, true, given.threads)
        if isinstance(first, Packed) and first.ggml_type != bf16.GGML_TYPE:
            for label, repack in (("ggml plain", False), ("ggml 8x8", True)):
                made = [peers.Graph(given.threads, repack).linear(w, m) for w in layers]
                require_close(f"{name} {label}", made[0](x)[:2], true, 1e-4)
                jobs[label] = partial(lambda gs: [g(x) for g in gs], made)
                graphs += made
    nbytes = float(sum(w.codes.nbytes if isinstance(w, ScaledFP8) else w.data.nbytes for w in layers))
    flops = 2.0 * m * rows_ * columns * len(layers)
    times, limit = race(jobs, given.seconds), read_bandwidth(given.threads)
    yield from rows(name, given.shape, given.threads, times, nbytes, flops, limit)
    for graph in graphs:
        graph.close()


def _torch_linears(x: np.ndarray, layers: list, name: str, true: np.ndarray, threads: int) -> dict[str, Job]:
    """torch's matrix products with the weights dequantized to bfloat16, where torch is installed."""
    with suppress(ImportError):
        import torch  # optional: a peer

        torch.set_num_threads(threads)
        wide = [torch.from_numpy(packed.dense(w)).to(torch.bfloat16) for w in layers]
        t = torch.from_numpy(x).to(torch.bfloat16)
        require_close(f"{name} torch bf16", (t @ wide[0].T).float().numpy()[:2], true, 5e-2)
        return {"torch bf16": lambda: [t @ w.T for w in wide]}
    return {}
