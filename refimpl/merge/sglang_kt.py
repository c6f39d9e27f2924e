"""Two folders for SGLang with kt-kernel, and what its command line must say (docs/ktransformers.md).

MODEL/   config, tokenizer, and safetensors with Hugging Face's names and an index, without routed experts
KT/      GGUF files with the routed experts, a file a layer, side by side
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal

LAYOUT, MODEL, KT = "sglang-kt", "MODEL", "KT"
METHOD = "LLAMAFILE"  # kt-kernel's word for experts in GGUF, in capitals
ROWS = 256  # of an expert's width that kt-kernel gives to a thread pool at least, and in whole numbers
NODES = Path("/sys/devices/system/node")


def check_columns(config: DeepSeekConfig, where: object) -> None:
    """UnsupportedError E3107 for experts that kt-kernel cannot cut."""
    if config.moe_intermediate_size % ROWS:
        raise refusal("E3107", where, found=config.moe_intermediate_size, expected=f"a multiple of {ROWS}")


def metadata(config: DeepSeekConfig) -> dict[str, str | int]:
    """What kt-kernel looks for in a GGUF beside its tensors."""
    return {
        "general.architecture": "deepseek2",
        "deepseek2.expert_count": config.n_routed_experts,
        "deepseek2.expert_used_count": config.num_experts_per_tok,
        "deepseek2.embedding_length": config.hidden_size,
        "deepseek2.expert_feed_forward_length": config.moe_intermediate_size,
    }


def numa_nodes() -> int:
    """Memory nodes of this machine, 1 where the system does not say."""
    return max(1, sum(p.name[4:].isdecimal() for p in NODES.glob("node*")))


def threadpools(width: int) -> int:
    """Thread pools for experts of that width: one a memory node, as far as each gets 256 rows."""
    return max(1, min(numa_nodes(), width // ROWS))


def flags(width: int) -> Iterator[tuple[str, str]]:
    """Flags of SGLang that a pair needs, beside the two folders; `width` is moe_intermediate_size."""
    yield "--kt-method", METHOD
    yield "--kt-cpuinfer", str(max(1, (os.cpu_count() or 2) // 2))
    yield "--kt-threadpool-count", str(threadpools(width))
    yield "--kt-num-gpu-experts", "0"  # without it, KT is off and nothing says so
    yield "--disable-shared-experts-fusion", ""
    yield "--attention-backend", "triton"
    yield "--mem-fraction-static", "0.85"
    yield "--chunked-prefill-size", "4096"


def launch_words(folder: Path, width: int) -> list[str]:
    """The words of the command that serves the pair on a machine like this one."""
    words = ["python", "-m", "sglang.launch_server", "--model", str(folder / MODEL), "--kt-weight-path"]
    return [*words, str(folder / KT), *(w for flag in flags(width) for w in flag if w)]


def launch_command(folder: Path, width: int) -> str:
    """The words of `launch_words`, quoted as a shell reads them, in one line."""
    return shlex.join(launch_words(folder, width))
