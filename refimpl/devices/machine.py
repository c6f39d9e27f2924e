"""What this machine has of all that refimpl can use: part by part, what a missing one costs, and what to do
about it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from refimpl import ops
from refimpl.cli import size
from refimpl.devices.memory import free_ram
from refimpl.errors import RefimplError
from refimpl.files import cache_base, cache_folder
from refimpl.kernels import processors

OK, LACKING, WRONG = "ok", "missing", "WRONG"
LEAST_DISK = 1e9  # bytes: the embedded model merged, and kernels compiled for it
NEEDED = {
    "numpy": "numpy",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "threadpoolctl": "threadpoolctl",
    "numba": "numba",
    "pyyaml": "yaml",
    "filelock": "filelock",
}
"""Packages without which a command ends in the middle, and the modules in them."""
EXTRAS = {
    "conformance": (("hypothesis", "pytest"), "judging kernels"),
    "server": (("fastapi", "uvicorn", "prometheus_client"), "the server"),
    "hub": (("huggingface_hub",), "models by their name on the Hugging Face Hub"),
    "tiktoken": (("tiktoken",), "the tokenizers of Kimi-K2 and Moonlight"),
    "notebooks": (("jupyterlab", "matplotlib"), "the notebooks and their pictures"),
    "completion": (("argcomplete",), "completion of commands and flags in a shell"),
}
"""Extra: the modules it brings, and what they are for."""
EXTRA = 'pip install "refimpl[{}]"'
"""What works in every folder: pip takes the package that is there, and brings what the extra lacks."""


class Finding(NamedTuple):
    """A part of the machine. `state` is OK, LACKING (it is done without, at a cost) or WRONG (something will
    fail).
    """

    name: str
    state: str
    found: str
    costs: str = ""
    do: str = ""


def findings() -> list[Finding]:
    """All parts. Importing torch and Numba for it takes seconds."""
    return [found for look in PARTS for found in look()]


def _python() -> Iterator[Finding]:
    wsl = ", WSL2" if "microsoft" in platform.release().lower() else ""
    where = f"{platform.system()} {platform.machine()}{wsl}"
    version = import_module("refimpl").__version__  # an import of the package would be one upward
    yield Finding("system", OK, f"refimpl {version}, Python {platform.python_version()}, {where}")
    absent = [name for name, module in NEEDED.items() if find_spec(module) is None]
    if absent:
        yield Finding(
            "packages", WRONG, f"not installed: {', '.join(absent)}", "most commands", "pip install refimpl"
        )
    else:
        yield Finding("packages", OK, "all that are needed are installed")


def _memory() -> Iterator[Finding]:
    cpus, cores, quota = len(processors.affinity()), processors.cores(), processors.quota()
    of = f" of {os.cpu_count()}" if cpus != os.cpu_count() else ""
    two = f", threads of {cores} cores" if cores < cpus else ""
    yield Finding("CPU", OK, f"{cpus}{of} CPUs that this process may use{two}")
    if quota is not None and quota < cpus:
        costs = "more threads than that stand still for the rest of each period; the kernels take no more"
        yield Finding("CPU quota", LACKING, f"{quota:.2g} CPUs' worth of time (cgroup)", costs, "raise it")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield Finding("RAM", OK, f"{size(free_ram())} free of {size(whole)}")


def _compiler() -> Iterator[Finding]:
    named = (sysconfig.get_config_var("CC") or "cc").split()[0]
    path = next(filter(None, map(shutil.which, (named, "cc", "gcc", "clang", "cl"))), None)
    if path:
        yield Finding("C compiler", OK, path)
    else:
        costs = "the codecs cannot be built anew, and Triton needs one on a GPU"
        yield Finding("C compiler", LACKING, "none on PATH", costs, _packaged("gcc"))
    try:
        codec = import_module(ops.CODEC)
    except ImportError:
        costs = "numpy decodes and encodes instead: merging and quantizing take many times longer"
        do = "install a C compiler, then pip install . again"
        yield Finding("codecs", LACKING, "not compiled", costs, do)
        return
    yield Finding("codecs", OK, "compiled")
    built = Path(str(codec.__file__)).read_bytes()
    if b"GOMP_parallel" in built or b"__kmpc_fork_call" in built:
        yield Finding("OpenMP", OK, "the codecs run on all cores")
    else:
        do = "with gcc: pip install . again; Apple's compiler has none"
        yield Finding("OpenMP", LACKING, "the codecs were built without", "they run on one core", do)


def _packaged(name: str) -> str:
    """How a package of the system is installed here."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    tools = {"apt-get": "apt-get install", "dnf": "dnf install", "pacman": "pacman -S", "apk": "apk add"}
    return next((f"{how} {name}" for tool, how in tools.items() if shutil.which(tool)), f"install {name}")


def _numba() -> Iterator[Finding]:
    if find_spec("numba") is None:
        return  # told among the packages
    try:
        import numba  # half a second

        simd: Any = import_module("refimpl.kernels.simd_llvm")
        level = simd.choose()
    except (ImportError, RefimplError) as error:  # of a numpy that is too new for it; of REFIMPL_SIMD
        costs = "the backend `cpu`, which is the one without a GPU"
        yield Finding("Numba", WRONG, str(error), costs, "pip install . again, or unset REFIMPL_SIMD")
        return
    yield Finding("Numba", OK, numba.__version__)
    if level == "generic":
        costs = "the CPU kernels run on portable instructions, several times slower"
        yield Finding("SIMD", LACKING, "neither AVX2 nor AVX-512 is used", costs, "nothing: it is the CPU")
    else:
        forced = " (REFIMPL_SIMD)" if os.environ.get("REFIMPL_SIMD") else ""
        yield Finding("SIMD", OK, f"{level}{forced}")


def _cache() -> Iterator[Finding]:
    try:
        base = cache_folder()
    except (RefimplError, OSError) as error:
        costs = "kernels are compiled, and the embedded model is merged, at every start"
        do = "set REFIMPL_CACHE to a folder you can write to"
        yield Finding("cache", LACKING, str(error), costs, do)
        base = None
    if base is not None:
        kept = sum(f.stat().st_size for f in base.glob("numba-*/**/*") if f.is_file())
        yield Finding("cache", OK, f"{base}, {size(kept)} of compiled kernels")
    there = next(p for p in (base or cache_base(), *(base or cache_base()).parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < LEAST_DISK:
        costs = "kernels cannot be kept, and files are refused for want of room"
        yield Finding("disk", LACKING, f"{size(free)} free at {there}", costs, "make room there")
    else:
        yield Finding("disk", OK, f"{size(free)} free at {there}")


def _gpu() -> Iterator[Finding]:
    """The GPU as torch sees it: a file of a driver is no proof, and on WSL2 it has another name."""
    without = "the backend `cuda`: models run on the CPU"
    driver = next(filter(os.path.exists, ops.GPU_DEVICES), None)
    if find_spec("torch") is None:
        yield Finding("torch", LACKING, "not installed", without, EXTRA.format("gpu"))
        return
    try:
        import torch  # seconds, and optional
    except (ImportError, OSError) as error:  # a library of its own that does not load
        yield Finding("torch", LACKING, f"does not load: {error}", without, "install it again")
        return
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    yield Finding("torch", OK, f"{torch.__version__}, built for {kind}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(i)
            name = torch.cuda.get_device_name(i)
            yield Finding("GPU", OK, f"cuda:{i}, {name}, {size(free)} free of {size(whole)}")
        yield from _triton()
    elif driver and not torch.version.cuda:
        found = f"there is a driver ({driver}), and torch was built without CUDA"
        yield Finding("GPU", LACKING, found, without, "install torch with CUDA: https://pytorch.org")
    elif driver:
        found = f"there is a driver ({driver}), and torch sees no GPU"
        do = "see what nvidia-smi says; on WSL2 the driver is that of Windows"
        yield Finding("GPU", LACKING, found, without, do)
    else:
        yield Finding("GPU", LACKING, "none", without, "nothing, where there is no NVIDIA GPU")


def _triton() -> Iterator[Finding]:
    if find_spec("triton"):
        yield Finding("Triton", OK, "installed")
    else:
        costs = "the backend `cuda` cannot multiply FP8 weights"
        yield Finding("Triton", LACKING, "not installed", costs, EXTRA.format("gpu"))


def _extras() -> Iterator[Finding]:
    for extra, (modules, about) in EXTRAS.items():
        absent = [m for m in modules if find_spec(m) is None]
        if absent:
            found = f"not installed: {', '.join(absent)}"
            yield Finding(f"[{extra}]", LACKING, found, about, EXTRA.format(extra))
        else:
            yield Finding(f"[{extra}]", OK, about)
    if absent := [m for m in ("prompt_toolkit", "rich") if find_spec(m) is None]:
        costs = "a chat at a terminal has a plain prompt, and nothing moves while one waits"
        yield Finding(
            "terminal", LACKING, f"not installed: {', '.join(absent)}", costs, "pip install refimpl"
        )


PARTS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _memory,
    _compiler,
    _numba,
    _cache,
    _gpu,
    _extras,
)


def show(found: list[Finding]) -> Iterator[str]:
    """The findings as lines for people."""
    for f in found:
        yield f"{f.state:8} {f.name:14} {f.found}"
        if f.costs:
            yield f"{'':23} what is lost: {f.costs}"
        if f.do:
            yield f"{'':23} what to do: {f.do}"


def verdict(found: list[Finding]) -> str:
    """The last line of the report: what must be put right, or that everything works."""
    wrong, lacking = (sum(f.state == s for f in found) for s in (WRONG, LACKING))
    if wrong:
        return f"{wrong} of these must be put right"
    parts = "one part is" if lacking == 1 else f"{lacking} parts are"
    return "everything works" + (f"; {parts} missing that can be done without" if lacking else "")
