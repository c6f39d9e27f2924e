"""A family: what operations with names alike have in common. Their inputs, their truth, and which laws hold
for them.

Recipes are dicts of JSON values: hypothesis draws and shrinks them, `build` makes the arguments, always the
same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.conformance.inputs import cached
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.bounds import Sum
from refimpl.conformance.truth.compare import Mismatch, number_of, same_bits, within
from refimpl.ops import OPS

Recipe = dict[str, Any]
Strategies = dict[str, st.SearchStrategy]
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Family:
    """Operations alike. `variants` are tried one by one, `recipe` is drawn, `build` makes arguments of
    both.
    """

    patterns: tuple[str, ...]
    recipe: Callable[[str, Manifest], Strategies]
    build: Callable[[str, Recipe, Manifest], tuple]
    truth: Callable[[str, tuple, Manifest], list[Sum]] | None = None  # of those whose demand is "bound"
    demand: Callable[[str, tuple, Manifest, tuple], Mismatch | None] | None = (
        None  # where neither bits nor a bound say it
    )
    # the demand where any nearest codes are declared, or a least magnitude
    nearest: Callable[[tuple, Manifest, tuple], Mismatch | None] | None = None
    want: Callable[[str, tuple, Manifest], Any] | None = (
        None  # exact results, where a manifest can change them; else the reference's
    )
    variants: Callable[[str, Manifest], list[Recipe]] = lambda op, m: [{}]
    edges: Callable[[str, Manifest], list[Recipe]] = lambda op, m: []  # shapes that are always tried
    large: Callable[[str, Manifest], list[Recipe]] = (
        lambda op, m: []
    )  # so much work that kernels give it to several threads
    relations: Mapping[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # metamorphic laws, see `relations`
    fixed: Mapping[str, str] = field(default_factory=dict)  # laws with enumerated inputs, see `exhaustive`
    # kinds of cases at real sizes, by the law that tries them, see `real_sizes`
    real: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    results: tuple[str, ...] = ("result",)
    codes: tuple[bool, ...] = (False,)  # results whose bytes are E4M3
    source: Callable[[str, tuple, tuple[int, ...]], str] | None = (
        None  # says for its author what a result at a place was made of
    )

    def laws(self) -> set[str]:
        """Names of the laws that this family adds to those of every operation."""
        return {*self.relations, *self.fixed, *self.real}

    def check(
        self, op: str, args: tuple, m: Manifest, got: tuple, sums: list[Sum] | None = None
    ) -> Mismatch | None:
        """Whether the results are what they must be. `sums` of these arguments need not be known before."""
        if self.demand:
            return self.demand(op, args, m, got)
        if self.nearest and (m.activations == "nearest" or m.least):
            return self.nearest(args, m, got)
        if wrong := number_of(got, self.results):
            return wrong
        if self.truth:
            sums = self.sums(op, args, m) if sums is None else sums
            return next(
                (bad for g, s, n in zip(got, sums, self.results) if (bad := within(g, s.true, s.bound, n))),
                None,
            )
        wanted = self.exact(op, args, m)
        bad = next(
            (
                bad
                for g, w, n, c in zip(got, wanted, self.results, self.codes)
                if (bad := same_bits(g, w, m.nan, c, n))
            ),
            None,
        )
        if bad and bad.where and self.source:
            return bad._replace(what=f"{bad.what}; {self.source(op, args, bad.where)}")
        return bad

    def sums(self, op: str, args: tuple, m: Manifest) -> list[Sum]:
        """The truth of each result of an operation whose demand is "bound", and how far from it a result may
        be.
        """
        find = self.truth
        if not find:
            return []
        found = cached.truth((op, m), args, lambda: find(op, args, m))  # type: ignore[arg-type, return-value]
        return [bounds.stored(m, Sum(*s)) for s in found]

    def exact(self, op: str, args: tuple, m: Manifest) -> tuple:
        """The results of an operation whose demand is "bits"."""
        return cached.truth((op, m), args, lambda: [self._exact(op, args, m)])[0]

    def _exact(self, op: str, args: tuple, m: Manifest) -> tuple:
        made = self.want(op, args, m) if self.want else OPS[op].reference(*args)
        return tuple(
            np.array(y) for y in (made if isinstance(made, tuple) else (made,))
        )  # not a view of the arguments


def reseeded(r: Recipe, seed: int) -> Recipe:
    """A recipe for arrays of the same shapes whose numbers are drawn anew from `seed`."""
    data = r.get("data")
    if isinstance(data, dict):
        return {**r, "data": {**data, "seed": seed}}
    if isinstance(data, str):
        return {**r, "data": np.random.default_rng(seed).bytes(len(data) // 2).hex()}
    return {**r, "seed": seed}
