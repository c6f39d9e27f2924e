"""What would keep SGLang with kt-kernel from serving a pair of folders, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from refimpl.checkpoint import gguf, names, safetensors
from refimpl.checkpoint.folder import read_config
from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError
from refimpl.merge import sglang_kt
from refimpl.tensors import TensorInfo

ARCHITECTURE = "DeepseekV3ForCausalLM"
GPU_EXPERTS = ("--kt-num-gpu-experts", "--kt-gpu-experts-ratio")
# What the GGUF loader of kt-kernel 0.7.2 has a size for (python/utils/loader.py); at any other it stops.
TYPES = """F32 F16 BF16 F64 I8 I16 I32 I64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K
IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS MXFP4"""


def sglang_kt_faults(folder: Path | str, command: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each fault of a folder with MODEL/ and KT/; [] when none was found. `command` are the
    flags that SGLang will be started with; without it, those that `convert_model` prints.
    """
    folder = Path(folder)
    found = [
        f"{folder / part} is missing: `convert_model --layout {sglang_kt.LAYOUT}` makes it"
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
    if command is None:
        command = read_flags(sglang_kt.launch_words(folder, config.moe_intermediate_size))
    return found + list(flag_faults(command, config, folder))


def read_flags(words: Sequence[str]) -> dict[str, str]:
    """{"--kt-method": "LLAMAFILE", ...} of the words of a command line; "" for a flag without a value."""
    found: dict[str, str] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, _, found[flag] = word.partition("=")
        elif flag:
            found[flag], flag = word, ""
    return found


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
            if stack.dtype not in TYPES.split():
                yield f"{stack.path}: {stack.name} is {stack.dtype}, which kt-kernel 0.7.2 does not read"
                return


def flag_faults(given: Mapping[str, str], config: DeepSeekConfig, folder: Path) -> Iterator[str]:
    """Faults of the flags that SGLang is started with, for the pair in `folder`."""
    yield from _paths(given, folder)
    if not any(flag in given for flag in GPU_EXPERTS):
        yield f"{GPU_EXPERTS[0]} is missing: without it KT is off, and nothing says so"
    for flag in GPU_EXPERTS:
        if not _is_zero(given.get(flag, "0")):
            yield f"{flag} {given[flag]}: {sglang_kt.MODEL}/ has no experts for the GPU, so it must be 0"
    method = given.get("--kt-method")
    if method is None:
        yield f"--kt-method is missing: SGLang takes AMXINT4 then, and a GGUF needs {sglang_kt.METHOD}"
    elif method != sglang_kt.METHOD:
        yield f"--kt-method {method}: experts in GGUF need {sglang_kt.METHOD}, in capitals"
    pools = given.get("--kt-threadpool-count", "1")
    most = config.moe_intermediate_size // sglang_kt.ROWS
    if not pools.isdecimal() or not 1 <= int(pools) <= most:
        yield f"--kt-threadpool-count {pools}: experts {config.moe_intermediate_size} wide allow 1 to {most}"
    chunk = given.get("--chunked-prefill-size", "4096")
    if not chunk.isdecimal() or int(chunk) < 1:
        yield f"--chunked-prefill-size {chunk}: kt-kernel before 0.7.2 corrupts its memory at 0 or less"


def _paths(given: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Faults of the two flags that name the two folders."""
    weights = given.get("--kt-weight-path")
    if weights is None:
        yield "--kt-weight-path is missing: without it KT is off, and nothing says so"
    elif Path(weights).resolve() != (folder / sglang_kt.KT).resolve():
        yield f"--kt-weight-path {weights} is not {folder / sglang_kt.KT}"
    model = given.get("--model", given.get("--model-path"))
    if model is None:
        yield "--model is missing"
    elif Path(model).resolve() != (folder / sglang_kt.MODEL).resolve():
        yield f"--model {model} is not {folder / sglang_kt.MODEL}"


def _is_zero(number: str) -> bool:
    try:
        return float(number) == 0
    except ValueError:
        return False
