"""Calls of every command: a model in small in all its forms, what is changed in it, and the flags."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import (
    arithmetic,
    chat,
    conformance,
    convert_model,
    diff,
    doctor,
    inspect,
    plan,
    quantize,
    rules,
    warmup,
)
from refimpl.bench import __main__ as bench
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.config import DeepSeekConfig
from refimpl.devices import placement
from refimpl.merge import sglang_kt
from refimpl.tiny import FP8_DIR
from tests.campaigns import make, words

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
        "\udcff",
        "x=" + "[" * 100_000,
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
    """Some of the flags with values that may be anything; "=" after one that has none, or before the values
    that it has.
    """
    found = []
    for name in names:
        if rng.random() < 0.2:
            name, equals, values = name.partition("=")
            usual = values.split("|") if values else ("1", "2", "0.5", "64")
            value = rng.choice(FLAG_VALUES if rng.random() < 0.15 else usual)
            found += [name] if equals and not values else [name, value]
    return found


# --- the commands -------------------------------------------------------------------------------------------

Call = tuple[Callable[[list[str]], Any], list[str]]


def _arithmetic(rng: random.Random, files: Files) -> Call:
    path = ["--model_path", str(_config_folder(rng, files))] if rng.random() < 0.98 else []
    tables = rng.sample([*arithmetic.TABLES, "x", ""], rng.choice((0, 1, 2)))
    flags = _flags(rng, "--context", "--gpu", "--tflops", "--cpu", "--mix", "--json=")
    return arithmetic.main, [*tables, *path, *flags]


def _plan(rng: random.Random, files: Files) -> Call:
    which, path = rng.random(), ["--model_path", str(_changed_model(rng, files))]
    if which < 0.05:
        path = ["--config", rng.choice(("deepseek-v3", "moonlight-16b-a3b", "deepseek-r2", "\x1b", ""))]
    elif which < 0.15:
        path = ["--gguf_path", path[1]]
    elif which < 0.25:
        path += [
            "--gguf_path",
            str(rng.choice((files.gguf, files.merged, files.gguf.parent, "~", "~nobody/x"))),
        ]
    names = ("--context", "--cpu_gbps", "--gpu_gbps", "--activations", "--json=")
    flags = _flags(rng, "--vram=0|1e-3|24|1e6", "--ram=0|512|1e-9", *names)
    return plan.main, [*path, "--cpu_gbps", "50", "--gpu_gbps", "900", *flags]


def _doctor(rng: random.Random, files: Files) -> Call:
    """This machine, or a pair of folders that may be none."""
    pair = files.room / "pair"
    if rng.random() < 0.8:
        pair.mkdir()
        for part, source in (
            (sglang_kt.MODEL, _changed_model(rng, files)),
            (sglang_kt.KT, files.gguf.parent),
        ):
            if rng.random() < 0.95:
                (pair / part).symlink_to(source)
    given = ["--for", sglang_kt.LAYOUT, str(pair)] if rng.random() < 0.95 else []
    return doctor.main, [*given, *_flags(rng, "--json=", "--for=sglang-kt|sglang|x")]


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


def _conversation(rng: random.Random, files: Files) -> Call:
    """Lines that come on stdin; see `stdin`."""
    path = files.merged if rng.random() < 0.5 else _changed_model(rng, files)
    variables = "--template_var=x=1|x=[|x=NaN|messages=1|x=" + "[" * 100_000
    flags = _flags(rng, "--json=", "--think=show|hide", variables, "--greedy=")
    return chat.main, ["--gguf_path", str(path), "--backend", "reference", "--max_new_tokens", "1", *flags]


LINES = (
    "What is 1 + 1?",
    "/help",
    "/regen",
    "/undo",
    "/clear",
    "/stats",
    "/system x",
    "/system",
    "/exit",
    "/",
)
LINES += ("/x", '"""', '"""a', 'b"""', "\x00\x1b[2J", "\u202e", "<｜User｜>", "a" * 9000, "", " ", "/stats x")


def stdin(rng: random.Random) -> bytes:
    """What somebody types, not all of it text."""
    lines = [rng.choice(LINES).encode() for _ in range(rng.randrange(6))]
    return b"\n".join([*lines, rng.choice((b"", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n\r"))])


def _warmup(rng: random.Random, files: Files) -> Call:
    flags = _flags(rng, "--backend=cpu|auto|cuda", "--activations=fp8|exact", "--json=")
    name = rng.choice(("--model_path", "--gguf_path"))
    return warmup.main, [name, str(_changed_model(rng, files)), *flags]


def _bench(rng: random.Random, files: Files) -> Call:
    """Flags alone: nothing is measured."""
    which = rng.random()
    if which < 0.4:
        given = ["system", "--config=tiny", f"--folder={files.room / 'random'}", "--layers=2"]
        names = ("--config=tiny|../x|x", "--layers", "--experts", "--vocabulary", "--tokens", "--context")
        return bench.main, [*given, *_flags(rng, *names, "--threads", "--activations=exact", "--json=")]
    if which < 0.6:
        return bench.main, ["formats", *_flags(rng, "--type=Q4_K|q4_k,x|,|F32,,BF16", "--json=")]
    kernels = rng.sample(["experts", "linear", "dequantize", "quantize", "fp8", "x"], rng.randrange(3))
    names = ("--shape=tiny|v3", "--tokens", "--threads", "--seconds", "--json=")
    return bench.main, [*kernels, *_flags(rng, *names)]


def _conformance(rng: random.Random, files: Files) -> Call:
    """Flags, manifests and expected failures: nothing is judged."""
    lists, manifest, report = (files.room / n for n in ("xfails", "manifest.toml", "report.md"))
    said = rng.choice((" ", "\n")).join(rng.choice((*XFAILS, *FLAG_VALUES)) for _ in range(4))
    lists.write_text(said, "utf-8", "surrogatepass")
    lines = [f"{rng.choice(MANIFEST)} = {rng.choice(TOML)}" for _ in range(rng.randrange(3))]
    manifest.write_text("\n".join(lines), "utf-8", "surrogatepass")
    names = ["--backend=cpu|reference", "--law=bits|nan|x", "--level=quick|smoke|full", "--case={}|[1]|x"]
    names += ["--seed", "--processes", "--seconds", "--memory", "--minutes", "--false-alarms", "--force="]
    names += [f"--xfails={lists}", f"--markdown={report}|{lists}", "--laws=", "--equivalents=", "--json="]
    if rng.random() < 0.5:
        names = [
            f"--manifest={manifest}",
            "--declare=array=torch|x=1|max_tokens=-1|max_tokens=" + "9" * 5000,
            *names[1:],
        ]
        names.insert(0, "--kernel=numpy:add|x:y|x|numpy:nothing|:")
    op = ["--op", rng.choice(("q4_k.dequantize", "linear", "mla_*", "*.x"))] if rng.random() < 0.8 else []
    return conformance.main, [*op, *_flags(rng, *names)]


XFAILS = ("q4_k.dequantize", "bits", "*", "#", "# why", "q4_k.dequantize cpu bits  # x", "\x00", "\x1b")
MANIFEST = ("array", "accumulation", "tolerance", "device", "max_tokens", "x", "", '"a.b"', "[x]", "\u202e")
TOML = (
    "1",
    "-1",
    "nan",
    "inf",
    '"torch"',
    "[]",
    "{}",
    "true",
    "1979-05-27",
    "9" * 400,
    '"\\u0000"',
    "[1, 'a']",
)


class Command(NamedTuple):
    """How to make a call, and its share of the cases."""

    call: Callable[[random.Random, Files], Call]
    share: float


COMMANDS = {
    "arithmetic": Command(_arithmetic, 0.34),
    "plan": Command(_plan, 0.05),
    "doctor": Command(_doctor, 0.01),
    "inspect": Command(_inspect, 0.30),
    "rules": Command(_rules, 0.01),
    "quantize": Command(_quantize, 0.03),
    "convert_model": Command(_convert, 0.02),
    "convert_model --verify": Command(_verify, 0.05),
    "diff": Command(_diff, 0.01),
    "chat": Command(_chat, 0.02),
    "chat, conversing": Command(_conversation, 0.01),
    "warmup": Command(_warmup, 0.01),
    "bench": Command(_bench, 0.04),
    "conformance": Command(_conformance, 0.10),
}
