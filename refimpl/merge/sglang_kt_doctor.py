"""What would keep SGLang with kt-kernel from serving a pair of folders, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from refimpl.checkpoint import gguf, names, safetensors
from refimpl.checkpoint.folder import read_config
from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError
from refimpl.merge import sglang_kt
from refimpl.tensors import TensorInfo

ARCHITECTURE = "DeepseekV3ForCausalLM"
NEEDED = ("--kt-weight-path", "--kt-method", "--kt-num-gpu-experts")


def sglang_kt_faults(folder: Path | str, command: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each fault of a folder with MODEL/ and KT/; [] when none was found. `command` are the
    flags that SGLang will be started with, where they are to be looked at too.
    """
    folder = Path(folder)
    found = [
        f"{folder / part} is missing"
        for part in (sglang_kt.MODEL, sglang_kt.KT)
        if not (folder / part).is_dir()
    ]
    if found:
        return found
    try:
        raw = read_config(folder / sglang_kt.MODEL)
        config = DeepSeekConfig.from_dict(raw, where=folder / sglang_kt.MODEL / "config.json")
    except RefimplError as error:
        return [error.line()]
    if raw.get("architectures") != [ARCHITECTURE]:
        found.append(
            f"config.json: architectures must be [{ARCHITECTURE!r}], not {raw.get('architectures')!r:.80}"
        )
    found += _model(folder / sglang_kt.MODEL, config)
    found += _experts(folder / sglang_kt.KT, config)
    return found + list(
        flag_faults(command or dict(sglang_kt.flags(config.moe_intermediate_size)), config, folder)
    )


def _model(folder: Path, config: DeepSeekConfig) -> Iterator[str]:
    """Faults of MODEL/: SGLang reads the files that the index names, and skips names it does not know."""
    if not (folder / safetensors.INDEX).exists():
        yield f"{folder / safetensors.INDEX} is missing: SGLang would not know which files to read"
        return
    try:
        there, _ = safetensors.read_folder(folder)
    except RefimplError as error:
        yield error.line()
        return
    if any(map(names.is_gguf, there)):
        yield f"{folder} has GGUF names, which SGLang skips: it would serve weights that were never loaded"
    wanted = {n for n in names.shapes(config) if not names.is_routed_expert(n)}
    if missing := sorted(wanted - there.keys()):
        yield f"{folder} lacks {missing[0]}" + (
            f" and {len(missing) - 1} more tensors" if missing[1:] else ""
        )
    if not any((folder / name).exists() for name in ("tokenizer.json", "tiktoken.model")):
        yield f"{folder} has no tokenizer"


def _experts(folder: Path, config: DeepSeekConfig) -> Iterator[str]:
    """Faults of KT/: kt-kernel looks at the .gguf files of the folder itself, and no deeper."""
    files = sorted(folder.glob("*.gguf"))
    if not files:
        yield f"{folder} has no .gguf file: kt-kernel looks no deeper than this folder"
        return
    there: dict[str, TensorInfo] = {}
    for path in files:
        try:
            there |= gguf.read(path).tensors
        except (RefimplError, OSError) as error:
            yield error.line() if isinstance(error, RefimplError) else f"{path}: {error.strerror}"
    if config.moe_intermediate_size % sglang_kt.ROWS:
        yield f"experts are {config.moe_intermediate_size} wide, no multiple of {sglang_kt.ROWS}"
    for name, shape in names.shapes(config).items():
        if names.is_routed_expert(name):
            stack = there.get(names.to_gguf(name))
            if stack is None:
                yield f"{folder} lacks {names.to_gguf(name)}"
                return
            if stack.shape != shape:
                yield f"{stack.path}: {stack.name} is {list(stack.shape)}, and the config says {list(shape)}"
                return


def flag_faults(given: Mapping[str, str], config: DeepSeekConfig, folder: Path) -> Iterator[str]:
    """Faults of SGLang's flags, {"--kt-method": "LLAMAFILE", ...}; --kt-weight-path may be left out."""
    for flag in NEEDED[1:]:
        if flag not in given and not (flag == NEEDED[2] and "--kt-gpu-experts-ratio" in given):
            yield f"{flag} is missing: without it KT is off, or takes another method, and nothing says so"
    method = given.get("--kt-method", sglang_kt.METHOD)
    if method != sglang_kt.METHOD:
        yield f"--kt-method {method}: experts in GGUF need {sglang_kt.METHOD}, in capitals"
    pools = given.get("--kt-threadpool-count", "1")
    if not pools.isdecimal() or not 1 <= int(pools) <= config.moe_intermediate_size // sglang_kt.ROWS:
        most = config.moe_intermediate_size // sglang_kt.ROWS
        yield f"--kt-threadpool-count {pools}: experts {config.moe_intermediate_size} wide allow 1 to {most}"
    chunk = given.get("--chunked-prefill-size", "4096")
    if not chunk.isdecimal() or int(chunk) < 1:
        yield f"--chunked-prefill-size {chunk}: kt-kernel before 0.7.2 corrupts its memory at 0 or less"
