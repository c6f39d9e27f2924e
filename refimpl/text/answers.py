"""How answers begin, are drawn and end, by the files that come with a model: one function for each
question, for the chat, for `Model.generate` and for what is written into a GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from refimpl import fields
from refimpl.checkpoint.folder import stop_token_ids
from refimpl.config import own_fields, token_ids
from refimpl.errors import refusal

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # those of `generate.Sampling`
    "temperature": (lambda v: 0 <= v <= 1e30, "a number from 0 up"),
    "top_k": (lambda v: isinstance(v, int) and v >= 0, "a whole number from 0 (all) up"),
    "top_p": (lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "a number from 0 to 1"),
}
# What transformers takes where sampling is asked for and no temperature is given.
TEMPERATURE = 1.0


def stop_ids(
    generation: Mapping[str, Any], config: Mapping[str, Any], eos_token: int | None, where: object
) -> frozenset[int]:
    """The ids that end an answer: generation_config.json's `eos_token_id`, else config.json's, else the id of
    tokenizer_config.json's `eos_token`. A number or a list; null counts as absent. InputFormatError E6108.
    """
    for found in (generation.get("eos_token_id"), own_fields(dict(config)).get("eos_token_id")):
        ids = token_ids(found)
        if ids is None:
            expected = "a token id or a list of them"
            raise refusal("E6108 malformed", where, found=repr(found)[:80], expected=expected)
        if ids:
            return frozenset(ids)
    return frozenset() if eos_token is None else frozenset([eos_token])


def sampling(generation: Mapping[str, Any], where: object) -> dict[str, float]:
    """The fields of `generate.Sampling` that a generation config asks for; {} is greedy.

    `do_sample` decides; where it is absent, a temperature does. UnsupportedError E4002 for a field that would
    change what is drawn and is not done, InputFormatError E6010 for a value that cannot be drawn with.
    """
    fields.judge("generation_config.json", generation, where)
    wanted = generation.get("do_sample")
    if wanted is not None and not isinstance(wanted, bool):
        raise refusal("E6010", where, found=f"do_sample {wanted!r:.40}", expected="true or false")
    values = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    greedy = wanted is False or (wanted is None and "temperature" not in values)
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good, expected = RANGES[name]
        if not number or not (greedy or good(value)):
            raise refusal("E6010", where, found=f"{name} {value!r:.40}", expected=expected)
    if greedy or values.get("temperature") == 0:
        return {}
    return {"temperature": TEMPERATURE} | values


def max_new_tokens(generation: Mapping[str, Any], where: object) -> int | None:
    """How long an answer may be by a generation config, None where it does not say. InputFormatError
    E6010.
    """
    found = generation.get("max_new_tokens")
    if found is None or (isinstance(found, int) and not isinstance(found, bool) and found >= 0):
        return found
    raise refusal("E6010", where, found=f"max_new_tokens {found!r:.40}", expected="a whole number from 0 up")


def generation_metadata(generation: Mapping[str, Any], where: object) -> dict[str, Any]:
    """A generation config's sampling and length as GGUF metadata; a temperature of 0 is greedy."""
    values = sampling(generation, where)
    names = {"temperature": "temp"} | {n: n for n in SAMPLING[1:]}
    found: dict[str, Any] = {
        f"general.sampling.{names[n]}": int(v) if n == "top_k" else float(v) for n, v in values.items()
    }
    if not values and generation.get("do_sample") is not None:
        found["general.sampling.temp"] = 0.0
    if (length := max_new_tokens(generation, where)) is not None:
        found["refimpl.max_new_tokens"] = length
    return found


def gguf_generation(meta: Mapping[str, Any], where: object) -> dict[str, Any]:
    """generation_config.json as a GGUF's metadata has it: stop ids, sampling, length."""
    found: dict[str, Any] = {"eos_token_id": ids} if (ids := stop_token_ids(meta, where)) else {}
    for name, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        value = meta.get(f"general.sampling.{key}")
        if value is not None:
            # Stored as float32, it had a short decimal.
            found[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    if "temperature" in found:
        found["do_sample"] = found["temperature"] != 0
    if "refimpl.max_new_tokens" in meta:
        found["max_new_tokens"] = meta["refimpl.max_new_tokens"]
    return found
