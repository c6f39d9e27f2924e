"""Environment variables that a library would answer with a traceback, or nobody at all: looked at before any
library reads them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from refimpl.errors import near, printable, refusal

MOST_THREADS = 1024  # more than any machine's; each is started, and a million are waited for in vain
OURS = (
    "REFIMPL_API_KEY",
    "REFIMPL_CACHE",
    "REFIMPL_CONFORMANCE_KERNEL",
    "REFIMPL_CUDA_DEVICE",
    "REFIMPL_DEBUG",
    "REFIMPL_SIMD",
)
"""Those that people set."""


def _count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MOST_THREADS


def _counts(text: str) -> bool:
    """OpenMP's list, one number for each level of nesting."""
    return all(_count(part.strip()) for part in text.split(","))


def _one_of(*words: str) -> Callable[[str], bool]:
    return lambda text: text in words


LEVELS = (
    "generic",
    "avx2",
    "vnni",
    "avx512",
    "bf16",
    "amx",
)  # kernels/simd_llvm.py asks the CPU which of them it has
THREADS = f"a number of threads, 1 to {MOST_THREADS}"
CHECKS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "NUMBA_NUM_THREADS": (_count, THREADS),
    "OMP_NUM_THREADS": (_counts, THREADS),
    "NUMBA_OPT": (_one_of("0", "1", "2", "3", "max"), "0, 1, 2, 3 or max"),
    "NUMBA_DEBUG": (_one_of("0", "1"), "0 or 1"),
    # Kernels hold LLVM's instructions, which are nothing without the compiler.
    "NUMBA_DISABLE_JIT": (_one_of("0"), "0 or nothing: the kernels cannot be run uncompiled"),
    "REFIMPL_SIMD": (_one_of(*LEVELS), ", ".join(LEVELS)),
    "REFIMPL_CUDA_DEVICE": (_one_of("cpu"), "cpu or nothing"),
}


def check_environment() -> None:
    """Look at the variables of this process. UnsupportedError E5021 for a value that cannot be used; a note
    for a name that is nearly one of ours. An empty value is none.
    """
    for name, (good, expected) in CHECKS.items():
        if (text := os.environ.get(name, "").strip()) and not good(text):
            raise refusal("E5021", name, found=printable(text, 60), expected=expected)
    for name in sorted(os.environ):
        if name.startswith("REFIMPL") and name not in OURS and (close := near(name, OURS, cutoff=0.85)):
            print(
                f"refimpl: note: {printable(name, 60)} is no variable of this package; "
                f"did you mean {close[0]}?",
                file=sys.stderr,
            )


def quiet_libraries() -> None:
    """Keep Numba from having colorama, where that is installed, write to our streams as the process ends."""
    os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")


def has_folder() -> bool:
    """Whether the current folder is still there; some libraries cannot be imported without."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True
