"""The latent cache of tensors, as `cache_machine` judges caches: arrays go in and come out. It lies on the
GPU; where there is none, Triton's interpreter writes into tensors of the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from refimpl.config import DeepSeekConfig
from refimpl.devices.cuda_cache import DeviceCache
from refimpl.formats import bf16


class OfTensors:
    """A `DeviceCache` of bfloat16, as models on a GPU have, between arrays."""

    def __init__(self, config: DeepSeekConfig):
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.cache = DeviceCache(config, [self.device] * config.num_hidden_layers, torch.bfloat16)

    def __getattr__(self, name: str) -> Any:
        """`reserve`, `advance`, `truncate` and `length` are the cache's own."""
        return getattr(self.cache, name)

    @staticmethod
    def stored(x: np.ndarray) -> np.ndarray:
        """What numbers, f32, are once they lie in the cache, f32."""
        return bf16.decode(bf16.encode(x))

    def extend(self, layer: int, *new: np.ndarray) -> tuple[Any, ...]:
        """As of `refimpl.cache.LatentCache`."""
        *parts, present = self.cache.extend(layer, *(torch.tensor(a, device=self.device) for a in new))
        return *(p.float().cpu().numpy() for p in parts), None if present is None else int(present)
