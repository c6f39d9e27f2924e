"""Write the embedded model's folders: the BF16 master as trained, and the FP8 checkpoint that is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import safetensors
from refimpl.formats import bf16



def save_bf16(weights: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> None:
    """model.safetensors and config.json: everything BF16 but the routers' correction biases, which stay float32 as in DeepSeek's files."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {n: ("F32", w.astype(np.float32)) if n.endswith("e_score_correction_bias") else ("BF16", bf16.encode(w)) for n, w in weights.items()}
    safetensors.save(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
