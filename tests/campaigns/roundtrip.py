"""What is written is read back the same: random checkpoints, with tokenizers, templates and generation
configs of every shape that `refimpl.fields` honours, quantized, merged and linked.

Exact logits of the F32 file, and of folders merged with it, are the checkpoint's to 1e-5 of the largest;
those of another type are the decoded tensors'. Prompt ids, stop ids, sampling defaults and templates are the
same in all. A case is one checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from refimpl import convert_model, fields, quantize
from refimpl.checkpoint.stored import FILE_TYPES
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.loading.opening import open_model
from refimpl.merge import sglang_kt
from refimpl.model import Model
from refimpl.reference.packed import dense
from refimpl.text import answers, sandbox, template, tiktoken_vocabulary, tokenizer
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from tests.campaigns import WHOLE, Part, Report
from tests.campaigns.checkpoints import TEMPLATES, write_checkpoint

__all__ = ["TEMPLATES", "run", "text_facts"]

SHORT, LONG = 12, 10_000
CLOSE = 1e-5
TEXTS = ("What is 12 + 30?", " a\n\nb <think> ", "<|im_end|>x", "Herzinfarkt im Haus 東京 2024", "don't")


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """Cases of this part; a failure can be had again with its number and seed."""
    failures: list[str] = []
    counts = Counter[str]()
    with (
        mock.patch.object(tokenizer, "open_library", _library),
        mock.patch.object(template, "render_in_child", sandbox.render),
        mock.patch.object(fields, "note", lambda text: None),
        mock.patch.object(quantize, "note", lambda text: None),
        mock.patch.object(tiktoken_vocabulary, "note", lambda text: None),
    ):
        for number in part.share(range(cases)):
            place = folder / f"case-{number}"
            found = _case(random.Random(f"roundtrip/{seed}/{number}"), place)
            failures += [f"case {number} of seed {seed}: {line}" for line in found]
            counts["different" if found else "the same"] += 1
            shutil.rmtree(place)
    return Report(counts.total(), failures, {"checkpoints": counts}, {})


def _library(raw: dict[str, Any]) -> sandbox.Library:
    """In this process: the files are the test's own, and a process for each would take most of the time."""
    return sandbox.InProcessTokenizer(json.dumps(raw))


def _case(rng: random.Random, place: Path) -> list[str]:
    source, single = place / "hf", place / "f32"
    write_checkpoint(rng, source)
    single.mkdir()
    quantize.write(quantize.plan(source, "F32"), single / "m.gguf")
    mix = rng.choice(list(FILE_TYPES))
    quantize.write(quantize.plan(source, mix), place / "mix.gguf")
    copies = {"F32": single / "m.gguf", f"a GGUF of {mix}": place / "mix.gguf"}
    for linked in (False, True):
        copies["linked" if linked else "merged"] = place / f"merged-{linked}"
        convert_model.write(convert_model.plan(source, single, linked=linked), place / f"merged-{linked}")
    ids = [rng.randrange(500) for _ in range(24)]
    truth, wanted = open_model(source, "reference", activations="exact"), text_facts(source, rng.random())
    logits = truth.logits(ids)
    found = []
    for name, path in copies.items():
        other = open_model(path, "reference", activations="exact")
        expected = logits
        if path == place / "mix.gguf":
            plain = {key: dense(other.checkpoint[key]) for key in other.checkpoint}
            expected = Model(other.config, plain, CpuBackend("reference", "exact")).logits(ids)
        error = np.abs(other.logits(ids) - expected).max() / np.abs(expected).max()
        if not error <= CLOSE:
            found.append(f"{name}: logits differ by {error:.1e} of the largest")
        found += _compared(name, model_facts(truth.config, path), model_facts(other.config, path))
        found += _compared(name, wanted, text_facts(path, wanted["number"]))
    if truth.config.moe_intermediate_size % sglang_kt.ROWS == 0 and truth.config.index_topk is None:
        pair = place / "pair"
        convert_model.write(convert_model.plan(source, single, layout=sglang_kt.LAYOUT), pair)
        found += _compared("the pair", wanted, text_facts(pair / sglang_kt.MODEL, wanted["number"]))
    return found


def _compared(name: str, wanted: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    return [f"{name}: {k} {facts[k]!r}, not {wanted[k]!r}"[:400] for k in wanted if facts[k] != wanted[k]]


def model_facts(config: DeepSeekConfig, place: Path) -> dict[str, Any]:
    """All fields of a model but the one that the tokenizer files have too. A GGUF has numbers in float32, and
    no key for those that name a way of choosing experts that groups say as well, or the rounding of
    activations of weights that it does not have.
    """
    found = {k: v for k, v in dataclasses.asdict(config).items() if k != "bos_token_id"}
    if place.suffix == ".gguf" or place.name == "hf":
        found = {k: v for k, v in found.items() if k not in ("topk_method", "scale_fmt")}
    found |= {f"rope_scaling.{k}": v for k, v in (found.pop("rope_scaling") or {}).items()}
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}


def text_facts(place: Path, number: float) -> dict[str, Any]:
    """All that must not change of what a folder says about text."""
    t = Tokenizer(place)
    rng = random.Random(number)
    turns = [
        Message("user", rng.choice(TEXTS)),
        Message("assistant", rng.choice(TEXTS), "so"),
        Message("user", "z"),
    ]
    prompt = t.encode_pieces(ChatTemplate.open(t).pieces(turns, thinking=number < 0.5))
    return {
        "number": number,
        "prompt": prompt,
        "texts": [t.encode(text) for text in TEXTS],
        "stop_ids": t.stop_ids,
        "bos": t.bos,
        "special": t.special,
        "control": t.control,
        "templates": t.templates,
        "sampling": answers.sampling(t.generation, place),
        "length": answers.max_new_tokens(t.generation, place),
    }
