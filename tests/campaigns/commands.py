"""Every command, called as its process calls it, with models, configs, metadata, manifests, rules and flags
that somebody made to break it: an answer, a line of usage or a refusal, never another exception; what it
prints is printable, and with `--json` it is JSON.

The models are small (two layers, two experts, 256 wide), so that a chat, a merge and a quantization take some
hundredths of a second. `cases` are shared among the commands by their cost.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from refimpl import arithmetic, chat, convert_model, diff, hub, inspect, plan, quantize, rules
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.config import DeepSeekConfig
from refimpl.devices import placement
from refimpl.errors import RefimplError, visible
from refimpl.tiny import FP8_DIR
from tests.campaigns import WHOLE, Part, Report, guard, keep, make, words

SHORT, LONG = 1000, 1_000_000
SECONDS = 10.0  # of CPU time for one call: a pattern of a stranger's tokenizer may take five
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 256,
}
FLAG_VALUES = (
    *("0", "1", "-1", "2", "7", "128", "4096", "2147483647", "2147483648", "1" + "0" * 30, "9" * 5000),
    *(
        "0.5",
        "1e308",
        "1e-320",
        "-0.0",
        "nan",
        "inf",
        "-inf",
        "0x10",
        "1_0",
        "",
        " ",
        "x",
        "\u202e1",
        "\ud800",
    ),
    *("*", "[", "--", "-", "/dev/null", "/", "..", "a" * 5000, "Q4_K_M", "q4_k", "F32", "deepseek-v3", "{}"),
)


class Files(NamedTuple):
    """What all cases start from."""

    checkpoint: Path  # FP8 safetensors, config, tokenizer
    gguf: Path  # its experts and all else, as Q8_0
    merged: Path  # a hybrid folder of the two
    room: Path  # for one case, emptied before each


def prepare(folder: Path) -> Files:
    """A small model in all three forms."""
    checkpoint, model, merged = folder / "fp8", folder / "gguf" / "model.gguf", folder / "merged"
    checkpoint.mkdir()
    model.parent.mkdir()
    raw = json.loads((FP8_DIR / "config.json").read_text()) | SMALL
    (checkpoint / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FP8_DIR / name, checkpoint / name)
    rng = np.random.default_rng(0)
    config = DeepSeekConfig.from_dict(raw)
    arrays = {n: (kind, _values(rng, kind, shape)) for n, (kind, shape) in names.hf_inventory(config).items()}
    safetensors.save(checkpoint / "model.safetensors", arrays)
    quantize.write(quantize.plan(checkpoint, "Q8_0"), model)
    convert_model.write(convert_model.plan(checkpoint, model.parent), merged)
    return Files(checkpoint, model, merged, folder / "room")


def _values(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind == "F8_E4M3":
        return rng.integers(0x20, 0x38, shape, np.uint8)
    dtype = safetensors.DTYPES[kind]
    values = rng.normal(1, 0.1, shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(dtype) if kind == "BF16" else values.astype(dtype)


# --- what is changed ----------------------------------------------------------------------------------------


def _linked(source: Path, room: Path) -> Path:
    """A folder of links to the files of another, some of which are then changed."""
    target = room / source.name
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target


def _change_json(rng: random.Random, folder: Path, name: str) -> None:
    data = make.json_bytes(
        rng, make.json_changed(rng, json.loads((folder / name).read_bytes()), rng.choice((1, 1, 2)))
    )
    (folder / name).unlink()
    (folder / name).write_bytes(data)


def _change_head(rng: random.Random, path: Path) -> None:
    """The JSON of a safetensors file."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = make.json_changed(rng, json.loads(whole[8:end]))
    path.unlink()
    path.write_bytes(make.safetensors_bytes(make.json_bytes(rng, header), whole[end:]))


def _change_gguf(rng: random.Random, path: Path) -> None:
    """Metadata of another value or type, with all tensors in place."""
    file = gguf.read(path)
    key = rng.choice([*file.metadata])
    near = file.metadata[key]
    value = rng.choice((make.number(rng, near) % 2**32 if type(near) is int else 0, *GGUF_VALUES))
    meta = file.metadata | {key: value}
    if rng.random() < 0.1:
        del meta[key]
    views = [(t, gguf.view(t)) for t in file.tensors.values()]
    path.unlink()  # what is mapped stays
    entries = [gguf.Entry(t.name, v.ggml_type, t.shape, lambda v=v: [v.data.tobytes()]) for t, v in views]
    gguf.write(path, meta, entries)


GGUF_VALUES: tuple[Any, ...] = (
    0,
    1,
    2**31,
    2**32 - 1,
    True,
    False,
    -1.0,
    0.0,
    1e30,
    3e38,
    "",
    "x",
    "yarn",
    "\x1b[2J",
)
GGUF_VALUES += ([], [0], ["a"], [1.5], "a" * 70_000, "{% for %}", "gpt2", [-1, 2**31 - 1])


def _changed_model(rng: random.Random, files: Files) -> Path:
    """A model of one of the three forms with something wrong in it."""
    kind = rng.choice(("checkpoint", "checkpoint", "gguf", "merged"))
    if kind == "gguf":
        folder = _linked(files.gguf.parent, files.room)
        _change_gguf(rng, folder / files.gguf.name)
        return rng.choice((folder, folder / files.gguf.name))
    folder = _linked(files.checkpoint if kind == "checkpoint" else files.merged, files.room)
    texts = sorted(p.name for p in folder.iterdir() if p.suffix == ".json")
    weighted = (
        ["config.json"] * 6
        + [n for n in texts if n != "tokenizer.json"]
        + ["tokenizer.json"] * (rng.random() < 0.1)
    )
    if rng.random() < 0.3:
        _change_head(rng, rng.choice(sorted(folder.glob("*.safetensors"))))
    else:
        _change_json(rng, folder, rng.choice(weighted))
    return folder


def _config_folder(rng: random.Random, files: Files) -> Path:
    """A folder with a config.json alone, which was changed."""
    folder = files.room / "config"
    folder.mkdir()
    shutil.copy(files.checkpoint / "config.json", folder / "config.json")
    _change_json(rng, folder, "config.json")
    return folder


def _flags(rng: random.Random, *names: str) -> list[str]:
    """Some of the flags with values that may be anything; "=" after one that has none."""
    found = []
    for name in names:
        if rng.random() < 0.2:
            value = rng.choice(("1", "2", "0.5", "64", *(FLAG_VALUES if rng.random() < 0.3 else ())))
            found += [name[:-1]] if name.endswith("=") else [name, value]
    return found


# --- the commands -------------------------------------------------------------------------------------------

Call = tuple[Callable[[list[str]], Any], list[str]]


def _arithmetic(rng: random.Random, files: Files) -> Call:
    path = ["--model_path", str(_config_folder(rng, files))] if rng.random() < 0.7 else []
    tables = rng.sample([*arithmetic.TABLES, "x", ""], rng.choice((0, 1, 2)))
    flags = _flags(rng, "--context", "--gpu", "--tflops", "--cpu", "--mix", "--json=")
    return arithmetic.main, [*tables, *path, *flags]


def _plan(rng: random.Random, files: Files) -> Call:
    path = (
        ["--model_path", str(_changed_model(rng, files))]
        if rng.random() < 0.7
        else ["--config", "deepseek-v3"]
    )
    flags = _flags(rng, "--context", "--cpu_gbps", "--gpu_gbps", "--activations", "--json=")
    return plan.main, [*path, "--cpu_gbps", "50", "--gpu_gbps", "900", *flags]


def _inspect(rng: random.Random, files: Files) -> Call:
    flags = _flags(rng, "--block", "--bits=", "--json=")
    if rng.random() < 0.5:
        path = files.room / "x.gguf"
        path.write_bytes(make.changed(rng, make.gguf_file(rng, rng.random() < 0.5)).write())
        return inspect.main, [str(path), *flags]
    path = _changed_model(rng, files)
    tensors = [
        "blk.1.ffn_gate_exps.weight",
        "model.norm.weight",
        "output.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    name = rng.choice(([], [rng.choice([*tensors, *FLAG_VALUES])]))
    return inspect.main, [str(path), *name, *flags]


def _rules(rng: random.Random, files: Files) -> Call:
    path = files.room / "rules.yaml"
    text = rng.choice(sorted(placement.FILES.glob("*.yaml"))).read_text()
    at = rng.randrange(len(text))
    path.write_text(text[:at] + rng.choice(words.YAML) + text[at + rng.choice((0, 1, 5)) :])
    model = ["--model_path", str(_changed_model(rng, files))] if rng.random() < 0.3 else []
    return rules.main, [str(path), *model, *_flags(rng, "--json=")]


def _quantize(rng: random.Random, files: Files) -> Call:
    folder, output = _changed_model(rng, files), files.room / "o.gguf"
    flags = _flags(rng, "--type", "--name", "--json=")
    return quantize.main, ["--safetensor_path", str(folder), "--output", str(output), "--type", "F16", *flags]


def _convert(rng: random.Random, files: Files) -> Call:
    folder = _linked(files.checkpoint, files.room)
    model = _linked(files.gguf.parent, files.room)
    if rng.random() < 0.5:
        _change_gguf(rng, model / files.gguf.name)
    else:
        _change_json(rng, folder, "config.json")
    flags = _flags(rng, "--link=", "--dry-run=", "--verify=", "--progress", "--json=", "--allow-mismatch=")
    paths = [
        "--safetensor_path",
        str(folder),
        "--gguf_path",
        str(model),
        "--output_path",
        str(files.room / "out"),
    ]
    return convert_model.main, [*paths, *flags]


def _verify(rng: random.Random, files: Files) -> Call:
    folder = _linked(files.merged, files.room)
    _change_json(rng, folder, rng.choice((convert_model.MANIFEST, convert_model.MANIFEST, safetensors.INDEX)))
    return convert_model.main, [
        "--output_path",
        str(folder),
        "--verify",
        *_flags(rng, "--json=", "--progress"),
    ]


def _diff(rng: random.Random, files: Files) -> Call:
    sides = [str(_changed_model(rng, files)), str(rng.choice((files.checkpoint, files.gguf, files.merged)))]
    rng.shuffle(sides)
    return diff.main, [*sides, *_flags(rng, "--tensor", "--min_sqnr", "--worst=", "--json=")]


def _chat(rng: random.Random, files: Files) -> Call:
    path = _changed_model(rng, files) if rng.random() < 0.8 else files.merged
    flags = _flags(
        rng,
        "--cpu_infer",
        "--temperature",
        "--top_p",
        "--top_k",
        "--min_p",
        "--seed",
        "--system",
        "--think",
        "--json=",
    )
    prompt = rng.choice(("What is 1 + 1?", "", "\ud800", "\x1b[2J\u202e", "<｜User｜>", "a" * 9000))
    fixed = ["--backend", "reference", "--max_new_tokens", "1", "-p", prompt]
    return chat.main, ["--gguf_path", str(path), *fixed, *flags]


class Command(NamedTuple):
    """How to make a call, and its share of the cases."""

    call: Callable[[random.Random, Files], Call]
    share: float


COMMANDS = {
    "arithmetic": Command(_arithmetic, 0.40),
    "plan": Command(_plan, 0.15),
    "inspect": Command(_inspect, 0.20),
    "rules": Command(_rules, 0.03),
    "quantize": Command(_quantize, 0.05),
    "convert_model": Command(_convert, 0.04),
    "convert_model --verify": Command(_verify, 0.05),
    "diff": Command(_diff, 0.05),
    "chat": Command(_chat, 0.03),
}


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """All commands; each has at least ten thousand cases in the long form."""
    files, failures, counts = prepare(folder), list[str](), dict[str, Counter[str]]()
    with guard.watched(), mock.patch.object(hub, "_download", _no_network):
        for name, command in COMMANDS.items():
            counts[name] = Counter()
            for i in part.share(range(max(1, round(cases * command.share)))):
                kind, why = _case(command, files, random.Random(f"commands/{name}/{seed}/{i}"))
                counts[name][kind] += 1
                if kind == "failed":
                    failures.append(f"{name} case {i} of seed {seed}: {why}")
                    keep(folder, f"{name.split()[0]}-{seed}-{i}", why.encode("utf-8", "backslashreplace"))
    return Report(sum(map(Counter.total, counts.values())), failures, counts, {})


def _no_network(name: str, wanted: Sequence[str]) -> Path:
    raise RefimplError("E5111", name, "no network in a campaign")


def _case(command: Command, files: Files, rng: random.Random) -> tuple[str, str]:
    shutil.rmtree(files.room, ignore_errors=True)
    files.room.mkdir()
    main, argv = command.call(rng, files)
    out, err, usage = io.StringIO(), io.StringIO(), []

    def call() -> None:
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main(argv)
        except SystemExit as end:
            usage.append(end.code)
        except (OSError, MemoryError) as error:  # one line of `cli.run`
            raise RefimplError("E5000", "machine", str(error)) from None

    kind, why = guard.outcome(call, SECONDS)
    if kind == "failed":
        return kind, f"{why} {argv!r:.600}"
    if usage:
        return ("usage", "") if usage == [2] else ("failed", f"exit {usage} {argv!r:.600}")
    if wrong := _printed(out.getvalue(), err.getvalue(), "--json" in argv, kind):
        return "failed", f"{wrong} {argv!r:.600}"
    return kind, why


def _printed(out: str, err: str, as_json: bool, kind: str) -> str:
    """What is wrong with what was printed; "" for nothing."""
    if visible(out) != out or visible(re.sub("\r|\x1b\\[K", "", err)) != re.sub("\r|\x1b\\[K", "", err):
        return f"not printable: {(out + err)!r:.200}"
    if as_json and kind == "accepted":
        try:
            json.loads(out, parse_constant=_no_constant)
        except ValueError as error:
            return f"not JSON ({error}): {out!r:.200}"
    return ""


def _no_constant(name: str) -> None:
    raise ValueError(name)
