"""The embedded model's folders: the BF16 master as trained, and from it what is shipped.

`python -m refimpl.training.export` makes `fp8/` (block FP8 in Hugging Face's layout) from the master and
`gguf/` (Q4_K_M) from `fp8/`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import quantize
from refimpl.checkpoint import names, safetensors
from refimpl.cli import Parser, run
from refimpl.formats import bf16
from refimpl.reference import fp8
from refimpl.tiny import BF16_DIR, FP8_DIR, GGUF_FILE

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
FP8_SCHEME = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def save_bf16(weights: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> None:
    """model.safetensors and config.json: everything BF16 but the routers' correction biases, which stay
    float32 as in DeepSeek's files.
    """
    arrays = {
        n: ("F32", w.astype(np.float32))
        if n.endswith("e_score_correction_bias")
        else ("BF16", bf16.encode(w))
        for n, w in weights.items()
    }
    _save(arrays, config, folder)


def save_fp8(master: Path, folder: Path) -> None:
    """The master with every linear of the layers in 128x128 blocks of E4M3, as DeepSeek ships its models."""
    header = safetensors.read(master / "model.safetensors")
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for name, info in header.tensors.items():
        array = safetensors.view(info)
        if names.is_fp8(name):
            w = fp8.weight_quant(bf16.decode(array))
            arrays |= {name: ("F8_E4M3", w.codes), name + "_scale_inv": ("F32", w.scale)}
        else:
            arrays[name] = (info.dtype, array)
    config = json.loads((master / "config.json").read_text()) | {"quantization_config": FP8_SCHEME}
    _save(arrays, dict(sorted(config.items())), folder)
    for file in COMPANIONS:
        shutil.copyfile(master / file, folder / file)


def _save(arrays: dict[str, tuple[str, np.ndarray]], config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save(folder / "model.safetensors", arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.training.export` with these arguments."""
    parser = Parser(prog="python -m refimpl.training.export", description=__doc__)
    parser.add_argument(
        "--master", type=Path, default=BF16_DIR, help=f"folder the trainer wrote (default {BF16_DIR})"
    )
    args = parser.parse_args(argv)
    save_fp8(args.master, FP8_DIR)
    GGUF_FILE.parent.mkdir(parents=True, exist_ok=True)
    quantize.write(
        quantize.plan(FP8_DIR, "Q4_K_M", "refimpl-tiny"), GGUF_FILE
    )  # from what is shipped, so that anybody can make it again
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
