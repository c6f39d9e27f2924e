"""`rope_scaling` and `rope_theta`. Configs have them under several names and in several places; they are read
in one way here, and refused where two of them contradict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.errors import refusal

PLACES = ("rope_scaling", "rope_parameters")  # DeepSeek's own files; what transformers 5 writes
_NAMES = ("type", "rope_type")  # of the kind of scaling
_THETA = "rope_theta"
_NEEDED = ("factor", "original_max_position_embeddings")  # programs differ on what their absence means
_YARN = {*_NEEDED, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"}


def one(found: Mapping[str, Any], name: str, where: object) -> Any:
    """The one value of several places, null where none has one. InputFormatError E4003 where they differ."""
    said = {place: value for place, value in found.items() if value is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        shown = ", ".join(f"{place}: {str(value)[:40]}" for place, value in said.items())
        raise refusal("E4003 twice", where, name=name, found=shown, expected="the same in all")
    return values[0] if values else None


def theta(raw: Mapping[str, Any], where: object) -> Any:
    """`rope_theta`, at the top or inside. Errors as `one`."""
    inside = {f"in {place}": (raw.get(place) or {}).get(_THETA) for place in PLACES}
    return one({"at the top": raw.get(_THETA)} | inside, _THETA, where)


def yarn(raw: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """The numbers of YaRN, None where nothing is scaled. Errors as `one`; UnsupportedError E4002 for another
    scaling; InputFormatError E4003 where the kind is not said, or one of the two numbers that have no usual
    value.
    """
    numbers = _numbers(raw, where)
    kind = one({name: numbers.pop(name, None) for name in _NAMES}, "rope_scaling type", where)
    if kind is None and _YARN & numbers.keys():
        raise refusal("E4003 missing", where, name="rope_scaling type")
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise refusal("E4002 scaling", where, found=repr(kind), expected="'yarn'")
    for name in _NEEDED:
        if name not in numbers:
            raise refusal("E4003 missing", where, name=f"rope_scaling {name}")
    return numbers


def _numbers(raw: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What is said of the scaling, wherever it stands, without `rope_theta`."""
    inside = {place: _said(raw.get(place)) for place in PLACES}
    names = dict.fromkeys(name for said in inside.values() for name in said)
    return {n: one({f"in {p}": said.get(n) for p, said in inside.items()}, n, where) for n in names}


def _said(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (scaling or {}).items() if v is not None and k != _THETA}
