"""The codecs: `python -m refimpl.bench dequantize quantize [--threads N] [--peers]`, every format of the
table; bytes are those of the float32.

All contenders return a new array each time. The peers, ggml's C and the package gguf, take one thread and are
left out for more; for E4M3 torch is the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import numpy as np

from refimpl import formats, ops
from refimpl.bench import peers
from refimpl.bench.measure import Row, Settings, require_close, rows
from refimpl.devices.speed import Job, race, read_bandwidth
from refimpl.formats import bf16, draw, e4m3, q8_k
from refimpl.reference import fp8

VERBS = {
    "dequantize": ("dequantize", "decode", "weight_dequant"),
    "quantize": ("quantize", "encode", "weight_quant", "act_quant"),
}
LINES = {"dequantize": 1024, "quantize": 64}  # of WIDTH numbers: quantizing is slower
WIDTH = 4096


def codecs(verb: str, given: Settings) -> Iterator[Row]:
    """The rows of OPS that decode, or those that encode, beside their references and peers."""
    for key, op in ops.OPS.items():
        family, _, function = key.partition(".")
        if function not in VERBS[verb] or "cpu" not in op.fast:
            continue
        module = next((m for m in formats.FORMATS.values() if m.NAME.lower() == family), None)
        label = module.NAME if module else "E4M3" if family == "e4m3" else function.replace("_", " ")
        name, fast, numbers = f"{verb} {label}", ops.load(key, "cpu"), _normal(LINES[verb])
        make = _encoded(key, module) if verb == "dequantize" else lambda x: x
        data = make(numbers)
        for one, other in zip(_parts(fast(make(numbers[:128]))), _parts(op.reference(make(numbers[:128])))):
            require_close(f"{name} cpu", one.astype(np.float64), other.astype(np.float64), 0.0)
        jobs: dict[str, Job] = {"cpu": partial(fast, data), "numpy": partial(op.reference, data)}
        if given.peers and given.threads == 1:
            jobs |= _torch(function, data) if module is None else _ggml(verb, module, data)
        times, limit = race(jobs, given.seconds), read_bandwidth(given.threads)
        yield from rows(name, given.shape, given.threads, times, numbers.nbytes, 0.0, limit)


def _normal(lines: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((lines, WIDTH), np.float32)


def _encoded(key: str, module: ModuleType | None) -> Callable:
    """From the float32 numbers to what is decoded: random bits under small scales; where no field of a block
    is a float, quantized numbers if there is a quantizer.
    """
    if module is None:
        return e4m3.encode if key == "e4m3.decode" else fp8.weight_quant
    if module is bf16 or (not draw.float_fields(module) and hasattr(module, "quantize")):
        return module.quantize
    return partial(_random_blocks, module)


def _random_blocks(module: ModuleType, x: np.ndarray) -> np.ndarray:
    data = np.random.default_rng(5).integers(
        0, 256, (len(x), formats.row_bytes(module.GGML_TYPE, WIDTH)), np.uint8
    )
    for name in draw.float_fields(module):
        data.view(module.BLOCK)[name] = 0.01
    return data


def _parts(result) -> tuple[np.ndarray, ...]:
    return result if isinstance(result, tuple) else (result,)


def _ggml(verb: str, module: ModuleType, data: np.ndarray) -> dict[str, Job]:
    kind, jobs = module.GGML_TYPE, {}
    if module is not q8_k:  # ggml's entry points leave that one out
        fresh = lambda: peers.dequantize(kind, data, np.empty((len(data), WIDTH), np.float32))  # noqa: E731
        jobs["ggml"] = fresh if verb == "dequantize" else partial(peers.quantize, kind, data)
    if find_spec("gguf"):
        import gguf  # optional: a peer

        theirs = partial(getattr(gguf.quants, verb), data, gguf.GGMLQuantizationType(kind))
        with suppress(NotImplementedError):  # it reads more types than it writes
            theirs()
            jobs["gguf-py"] = theirs
    return jobs


def _torch(function: str, data) -> dict[str, Job]:
    """torch's own casts, where it is installed."""
    if not find_spec("torch") or function not in ("decode", "encode"):
        return {}
    import torch  # optional: a peer

    torch.set_num_threads(1)
    t = torch.from_numpy(data)
    return {
        "torch": (lambda: t.view(torch.float8_e4m3fn).float())
        if function == "decode"
        else (lambda: t.to(torch.float8_e4m3fn))
    }
