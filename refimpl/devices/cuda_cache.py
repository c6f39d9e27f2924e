"""The latent cache of a model on GPUs: each layer's rows beside the layer, and shapes that stay, as graphs
want them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from refimpl.cache import PREFILL, LatentCache, capacity
from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal
from refimpl.kernels.linear_torch import by_triton, launches


class DeviceCache(LatentCache):
    """The latent cache with each layer's rows [capacity, L+r] where the layer is. One new token sees all
    rows, and the length on the device.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        devices: list[torch.device | None],
        dtype: torch.dtype,
        prefill: int = PREFILL,
    ):
        super().__init__(config, prefill)
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
        """Bytes that the cache holds on all its devices."""
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

    def extend(self, layer: int, latent: Any, k_pe: Any, *index: Any) -> tuple[Any, ...]:
        """Write the rows of the new tokens and return all S rows, as the host's cache does; for one token on
        a GPU return all rows there is room for, and how many are present.
        """
        rows, end, parts = self._tensors[layer], self.length + len(latent), self.parts[: 2 + len(index)]
        if isinstance(rows, np.ndarray) or len(latent) > 1:
            for part, new in zip(self.parts, (latent, k_pe, *index)):
                rows[self.length : end, part] = new
            return *(rows[:end, part] for part in parts), None
        place, present = self._marks[rows.device]
        if by_triton(latent) and not index:
            launches().write_row(latent, k_pe, rows, place)
        else:
            new = torch.cat((latent, k_pe, *index), dim=1).to(rows.dtype)
            rows[:, : new.shape[1]].index_copy_(0, place, new)
        return *(rows[:, part] for part in parts), present
