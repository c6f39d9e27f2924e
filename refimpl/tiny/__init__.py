"""The embedded model: a real DeepSeek-V3 of 7 million weights that does small sums and knows number formats.

`fp8/` is its checkpoint as Hugging Face lays them out, with block FP8 weights; `gguf/` holds the same weights
as Q4_K_M, made from it by `refimpl.quantize`. `problems.py` writes the training text, `train.py` is the
recipe that made the weights, `evaluate.py` measures them.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FP8_DIR = FOLDER / "fp8"
GGUF_DIR = FOLDER / "gguf"
GGUF_FILE = GGUF_DIR / "refimpl-tiny-Q4_K_M.gguf"
BF16_DIR = Path("out/tiny-bf16")  # written by the trainer, not shipped
