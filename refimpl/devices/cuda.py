"""The cuda backend: modules on GPUs through torch, routed experts on the CPU beside them.

    GPU     norm, attention, norm, route |  shared expert   | + ...
    CPU                                  | routed experts   |

Activations are float32 between operations. Weights are brought over once, tensor by tensor: FP8 as it is,
BF16 as it is, GGML blocks dequantized to bfloat16, `kv_b` (which absorption needs as numbers) in bfloat16;
with activations="exact" the last two in float32. The latent cache is bfloat16 or float32 likewise. Routed
experts stay in the mapped file.

Decoding one token runs its stretches of GPU operations as CUDA graphs. Shapes must not change in a graph, so
one new token looks at all rows that the cache has room for, and its length, a number on the device, masks the
rest. Room grows by doubling, and only then are graphs captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from refimpl import ops
from refimpl.cache import ROOM, LatentCache, capacity
from refimpl.config import DeepSeekConfig
from refimpl.devices import memory
from refimpl.devices.cpu import Host, check_gpu, on_cpu_tensors
from refimpl.errors import refusal
from refimpl.formats import bf16
from refimpl.kernels import worker
from refimpl.kernels.linear_torch import joined, side_by_side, takes_codes
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, ScaledFP8, Stack, Weight


def hybrid(module: str) -> str:
    """Placement without rules: routed experts and the embedding table on the CPU, all else on the first
    GPU.
    """
    return "cpu" if module == "model.embed_tokens" or ".mlp.experts" in module else "cuda:0"


class Devices(Host):
    """Modules where `place` says, by name: "cpu" or "cuda:N". Whole layers can be on the CPU; in a layer on a
    GPU its experts are, and single linears may be. Without `graphs` every operation is launched by itself.
    UnsupportedError E5030 without a GPU.
    """

    def __init__(self, place: Callable[[str], str] = hybrid, activations: str = "fp8", graphs: bool = True):
        check_gpu()
        super().__init__("cuda")
        self.place, self.quantized = place, activations == "fp8"
        self.narrow = torch.bfloat16 if activations == "fp8" else torch.float32
        self.graphs = graphs and not on_cpu_tensors()
        self.fused = True
        self.experts: Experts | InTurn = Experts()
        self._weights: dict[str, Any] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def eager(self) -> Devices:
        """The same weights on the same devices, without graphs, one operation after the other and each linear
        by itself.
        """
        other = copy(self)
        other.graphs, other.fused, other.experts = False, False, InTurn()
        return other

    def load(self, module: str, name: str) -> Callable:
        """The row's torch function where the module is on a GPU; its cpu function otherwise, and for routed
        experts.
        """
        return ops.load(name, "cpu" if name == "experts" or self._device(module) is None else "cuda")

    def _device(self, module: str) -> torch.device | None:
        """Where the activations of a module are, None for numpy: in a layer its attention decides."""
        parts = module.split(".")
        return _torch_device(
            self.place(".".join([*parts[:3], "self_attn"]) if parts[1:2] == ["layers"] else module)
        )

    # --- weights ---

    def weight(self, name: str, weight: Weight | Stack) -> Any:
        """Tensors on the module's device, dequantized where its rule says so; what stays on the CPU is
        returned as it is.
        """
        find = getattr(self.place, "find", None)
        if find is not None and find(name.removesuffix(".weight")).operator == "bf16":
            return self._place(name, weight, self._numbers)
        return self._place(name, weight, self._tensor)

    def numbers(self, name: str, weight: Weight | Stack) -> Any:
        """FP8 and GGML blocks dequantized, to bfloat16 unless activations are exact."""
        found = self._place(name, weight, self._numbers)
        return found if isinstance(found, torch.Tensor) else dense(found)

    def side_by_side(self, names: tuple[str, str], weights: tuple[Any, Any]) -> tuple[Any, Any]:
        """The two in one piece of memory, where they fit together."""
        if joined(*weights) is not None:
            return weights
        weights = side_by_side(*weights)
        self._weights.update((n, w) for n, w in zip(names, weights) if n in self._weights)
        return weights

    def both(self, linear: Callable) -> Callable:
        """One product where the two lie in one piece."""

        def product(x: Any, first: Any, second: Any) -> tuple[Any, ...]:
            whole = joined(first, second)
            return (
                separate(x, first, second)
                if whole is None
                else linear(x, whole).split((first.shape[0], second.shape[0]), dim=-1)
            )

        separate = super().both(linear)
        return product if self.fused else separate

    def takes_codes(self, *weights: Any) -> bool:
        """Whether they are FP8, on a GPU, and multiplied as such: the norm before them can quantize then."""
        return self.fused and self.quantized and bool(weights) and all(map(takes_codes, weights))

    def _place(self, name: str, weight: Weight | Stack, convert: Callable) -> Any:
        module = name.removesuffix(".weight")
        device = _torch_device(self.place(module))
        if device is None or self._device(module) is None:
            return weight
        if name not in self._weights:
            found = convert(weight)
            parts: Any = found if isinstance(found, ScaledFP8) else (found,)
            moved: Any = [a.to(device) for a in parts]
            self._weights[name] = ScaledFP8(*moved) if isinstance(found, ScaledFP8) else moved[0]
        return self._weights[name]

    def _tensor(self, weight: Any) -> Any:
        if isinstance(weight, ScaledFP8):
            return ScaledFP8(_copy(weight.codes), _copy(weight.scale))
        if isinstance(weight, Packed) and weight.ggml_type == bf16.GGML_TYPE:
            return _copy(weight.data.view(np.int16).reshape(weight.shape)).view(torch.bfloat16)
        return self._narrowed(dense(weight)) if isinstance(weight, Packed) else _copy(weight)

    def _numbers(self, weight: Any) -> torch.Tensor:
        return self._narrowed(dense(weight)) if isinstance(weight, ScaledFP8) else self._tensor(weight)

    def _narrowed(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.narrow)

    # --- activations ---

    def bring(self, module: str, *arrays: Any) -> tuple[Any, ...]:
        """Tensors on the module's device, or numpy arrays for a module on the CPU."""
        device = self._device(module)
        if device is None:
            return tuple(self.numpy(a) for a in arrays)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched on the current one
        return tuple(
            (a if isinstance(a, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(a))).to(device)
            for a in arrays
        )

    def numpy(self, x: Any) -> np.ndarray:
        """The array a tensor holds, on the host."""
        return x.cpu().numpy() if isinstance(x, torch.Tensor) else x

    def start(self, function: Callable, *args: Any) -> Callable[[], Any]:
        """Begin routed experts on the CPU while the GPU goes on; the result is wanted on the device x came
        from.
        """
        return (
            self.experts.start(function, *args)
            if isinstance(args[0], torch.Tensor)
            else super().start(function, *args)
        )

    def segment(self, function: Callable) -> Callable:
        """`function` of tensors and a cache, as a CUDA graph when one token is decoded."""
        return Segment(function, self._pool) if self.graphs else function

    def check_room(self, checkpoint: Any, config: DeepSeekConfig, activations: str) -> None:
        """ResourceError E7020 where a GPU has not the room for its part, UnsupportedError E7010 where it is
        not there.
        """
        if on_cpu_tensors():
            return
        free = memory.have()
        found = memory.parts(memory.Source.of(checkpoint, config), self.place, ROOM, activations)
        if missing := set(memory.totals(found)) - set(free):
            raise refusal("E7010", ", ".join(sorted(missing)), expected=", ".join(sorted(free)))
        memory.check(found, free, getattr(checkpoint, "folder", "model"))

    def new_cache(self, config: DeepSeekConfig) -> LatentCache:
        """A cache whose rows lie with their layers."""
        devices = [self._device(f"model.layers.{i}.self_attn") for i in range(config.num_hidden_layers)]
        return DeviceCache(config, devices, self.narrow)


def _torch_device(where: str) -> torch.device | None:
    return None if where == "cpu" else torch.device("cpu" if on_cpu_tensors() else where)


def _copy(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))  # mapped files are read-only, which torch does not like


class DeviceCache(LatentCache):
    """The latent cache with each layer's rows [capacity, L+r] where the layer is. One new token sees all
    rows, and the length on the device.
    """

    def __init__(self, config: DeepSeekConfig, devices: list[torch.device | None], dtype: torch.dtype):
        super().__init__(config)
        self.capacity, self.epoch, width = 0, 0, self._rows.shape[2]
        self._tensors = [
            np.empty((0, width), np.float32) if d is None else torch.zeros(0, width, dtype=dtype, device=d)
            for d in devices
        ]
        # {device: where the next row goes, rows then present}
        integers = partial(torch.zeros, dtype=torch.int64)
        self._marks = {d: (integers(1, device=d), integers((), device=d)) for d in devices if d is not None}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self._tensors)

    def reserve(self, new: int) -> None:
        """Make room for `new` more tokens; raises as `check`."""
        needed = self.length + new
        self.check(needed)
        if needed > self.capacity:
            try:
                self._grow(capacity(needed, self.limit))
            except torch.OutOfMemoryError:
                raise refusal("E7022", "context", found=needed) from None
        for place, present in self._marks.values():
            place.fill_(self.length)
            present.fill_(needed)

    def _grow(self, capacity: int) -> None:
        self.epoch += 1  # even if it fails halfway: graphs must not write to rows that are gone
        for i, old in enumerate(self._tensors):  # one by one: old and new exist together for one layer only
            shape = (capacity, old.shape[1])
            # zeros, as what the mask leaves out must at least be finite
            grown = (
                np.zeros(shape, np.float32)
                if isinstance(old, np.ndarray)
                else torch.zeros(shape, dtype=old.dtype, device=old.device)
            )
            grown[: self.length] = old[: self.length]
            self._tensors[i] = grown
        self.capacity = capacity

    def extend(self, layer: int, latent: Any, k_pe: Any) -> tuple[Any, Any, Any]:
        """As the host's cache; for one token on a GPU all rows there is room for, and how many are
        present.
        """
        rows, end = self._tensors[layer], self.length + len(latent)
        if isinstance(rows, np.ndarray) or len(latent) > 1:
            rows[self.length : end, : self.split], rows[self.length : end, self.split :] = latent, k_pe
            return rows[:end, : self.split], rows[:end, self.split :], None
        place, present = self._marks[rows.device]
        rows.index_copy_(0, place, torch.cat((latent, k_pe), dim=1).to(rows.dtype))
        return rows[:, : self.split], rows[:, self.split :], present


class Experts:
    """Routed experts on the CPU's own thread: activations and choices go there through pinned memory, the
    result comes back through it.
    """

    def __init__(self):
        self._buffers: dict[str, torch.Tensor] = {}

    def start(
        self, function: Callable, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *args: Any
    ) -> Callable[[], torch.Tensor]:
        """Begin function(x, ids, weights, *args); what is returned waits for the result."""
        arrays = [
            self._buffer(name, a).copy_(a, non_blocking=True)
            for name, a in (("x", x), ("ids", ids), ("weights", weights))
        ]
        result = self._buffer("y", x)
        copied = torch.cuda.Event() if x.is_cuda else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(x.device))
        future = worker.submit(self._run, copied, function, [a.numpy() for a in arrays], args, result.numpy())

        def finish() -> torch.Tensor:
            future.result()
            return result.to(x.device, non_blocking=True, copy=True)

        return finish

    @staticmethod
    def _run(
        copied: Any, function: Callable, arrays: list[np.ndarray], args: tuple, result: np.ndarray
    ) -> None:
        if copied is not None:
            copied.synchronize()
        result[:] = function(*arrays, *args)

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory of that shape. The next layer's copies into it come after this one's are done: they
        wait in the same stream.
        """
        found = self._buffers.get(name)
        if found is None or found.numel() < like.numel():
            found = self._buffers[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.is_cuda)
        return found[: like.numel()].view(like.shape)


class InTurn:
    """Routed experts in the caller's thread, on arrays of their own."""

    def start(
        self, function: Callable, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *args: Any
    ) -> Callable[[], torch.Tensor]:
        """As `Experts.start`, and done when it returns."""
        result = torch.from_numpy(function(*(a.cpu().numpy() for a in (x, ids, weights)), *args)).to(x.device)
        return lambda: result


class Segment:
    """A function of tensors and a cache. For one token it is captured the first time, and replayed while the
    cache has the same room.

    The tensors of that first call are the graph's own from then on: later ones are copied into them, except
    those that are the same.
    """

    def __init__(self, function: Callable, pool: Any):
        self.function, self.pool, self.key = function, pool, None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *args: Any) -> Any:
        first = args[0].codes if isinstance(args[0], ScaledFP8) else args[0]
        if not isinstance(first, torch.Tensor) or len(first) > 1:
            return self.function(*args)
        key = tuple((id(a), a.epoch) if isinstance(a, DeviceCache) else type(a) for a in args)
        if key != self.key:
            self._capture(key, args)
        for own, a in zip(_tensors(self.args), _tensors(args)):
            if a is not own:
                own.copy_(a)
        assert self.graph is not None
        self.graph.replay()
        return self.out

    def _capture(self, key: Any, args: tuple) -> None:
        self.graph = self.key = self.out = None
        self.function(
            *args
        )  # compiles and allocates what capturing must not; the cache's row is written again later
        self.args, graph, stream = args, torch.cuda.CUDAGraph(), _capturing(next(_tensors(args)).device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The experts' thread may wait for an event meanwhile: only this thread is watched.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.out = self.function(*args)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.key = graph, key


def _tensors(args: tuple) -> Iterator[torch.Tensor]:
    """Those among them, and those that quantized activations consist of."""
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, ScaledFP8):
            yield from a


@cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: the matrix library keeps a workspace for each."""
    return torch.cuda.Stream(device)
