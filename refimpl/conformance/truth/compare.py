"""Two ways of being equal: the same bits, or within a bound of the truth, element by element. Never a
norm.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Mismatch(NamedTuple):
    """The element that is furthest off."""

    what: str
    where: tuple[int, ...] = ()
    got: str = ""
    want: str = ""
    bound: float | None = None
    times: float | None = None  # how often the bound fits into the error
    breaks: str = ""  # the law that this breaks, whatever law asked: "form", "survives"

    def text(self) -> str:
        """The mismatch as one line for people."""
        parts = [self.what]
        if self.got:
            parts.append(f"at {list(self.where)}: got {self.got}, want {self.want}")
        if self.bound is not None:
            parts.append(f"bound {self.bound:.6g}, missed {self.times:.4g} times over")
        return "; ".join(parts)


def shown(number: np.generic | float) -> str:
    """A number with its bits."""
    x = np.asarray(number)
    digits = x.tobytes()[::-1].hex() if x.dtype.byteorder != ">" else x.tobytes().hex()
    return f"{x[()]!s} (0x{digits})"


def form(got: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, name: str = "result") -> Mismatch | None:
    """What is wrong with the shape or dtype of a result; None where both are as wanted."""
    if not isinstance(got, np.ndarray | np.generic):
        return Mismatch(f"the {name} is {_kind(got)}, not an array", breaks="form")
    if got.shape != shape:
        return Mismatch(f"the {name} has shape {list(got.shape)}, not {list(shape)}", breaks="form")
    if got.dtype != dtype:
        return Mismatch(f"the {name} is {got.dtype}, not {dtype}", breaks="form")
    return None


def _kind(value: object) -> str:
    dtype = getattr(value, "dtype", None)
    return f"a {type(value).__name__}" + (f" of {dtype}" if dtype is not None else "")


def number_of(got: tuple, names: tuple[str, ...]) -> Mismatch | None:
    """What is wrong with the number of results; None where there are as many as the reference has."""
    if len(got) == len(names):
        return None
    return Mismatch(f"{len(got)} results instead of {len(names)}: {', '.join(names)}", breaks="form")


def same_bits(
    got: np.ndarray, want: np.ndarray, nan: str = "bits", codes: bool = False, name: str = "result"
) -> Mismatch | None:
    """Every bit. `nan="any"`: a NaN equals a NaN; with `codes` the elements are E4M3, whose NaN are 0x7f and
    0xff.
    """
    if wrong := form(got, want.shape, want.dtype, name):
        return wrong
    got, want = np.atleast_1d(got), np.atleast_1d(want)
    a, b = (np.ascontiguousarray(x).view(f"u{want.dtype.itemsize}") for x in (got, want))
    equal = a == b
    if equal.all():
        return None
    if nan == "any" and codes:
        equal |= ((a & 0x7F) == 0x7F) & ((b & 0x7F) == 0x7F)
    elif nan == "any" and want.dtype.kind == "f":
        equal |= np.isnan(got) & np.isnan(want)
    if equal.all():
        return None
    at = tuple(int(i) for i in np.argwhere(~equal)[0])
    count = int(equal.size - equal.sum())
    return Mismatch(
        f"{count} of {equal.size} elements of the {name} have other bits", at, shown(got[at]), shown(want[at])
    )


def within(got: np.ndarray, true: np.ndarray, bound: np.ndarray, name: str = "result") -> Mismatch | None:
    """|got - true| <= bound for every element, `true` in float64. What is not finite must be not finite in
    the same way.
    """
    if wrong := form(got, true.shape, np.dtype(np.float32), name):
        return wrong
    if not got.size:
        return None
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(np.float64) - true)
        times = np.where(error == 0, 0.0, error / np.broadcast_to(bound, true.shape))
    strange = ~(np.isfinite(got) & np.isfinite(true))
    alike = (np.isnan(got) & np.isnan(true)) | (np.isinf(got) & (got == true))
    times = np.where(strange, np.where(alike, 0.0, np.inf), times)
    times = np.where(np.isnan(times), np.inf, times)
    if (times <= 1).all():
        return None
    at = tuple(int(i) for i in np.unravel_index(np.argmax(times), times.shape))
    off = float(np.broadcast_to(bound, true.shape)[at])
    with np.errstate(over="ignore"):
        want = f"{true[at]!s} ({shown(np.float32(true[at])).partition('(')[2]}"  # bits of the nearest float32
    what = f"{int((times > 1).sum())} of {times.size} elements of the {name} are outside the bound"
    return Mismatch(what, at, shown(got[at]), want, off, float(times[at]))
