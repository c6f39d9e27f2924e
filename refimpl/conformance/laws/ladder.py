"""The ladder: named laws, from enumeration to robustness. Each takes a trial (a kernel of an operation) and a
recipe, and finds a mismatch or not.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl import ops
from refimpl.conformance import threads as thread_counts
from refimpl.conformance.families.family import SEEDS, Family, Recipe, reseeded
from refimpl.conformance.families.relations import Reach, Relation
from refimpl.conformance.inputs import arrays, guarded
from refimpl.conformance.inputs.arrays import contents, copy, laid_out, leaves
from refimpl.conformance.laws import exhaustive, extremes, real_sizes
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.trial import KernelEnded, KernelRaised, Trial
from refimpl.conformance.truth.compare import Mismatch, same_bits, shown, within
from refimpl.conformance.verdict import LEVELS

Check = Callable[[Trial, Recipe], Mismatch | None]
FORM = "form"
"""The law that is judged first. Nothing else is said of a kernel that breaks it."""
WAYS = "ways"
"""The law that is judged last, by what all others have entered."""


@dataclass(frozen=True)
class Law:
    """`check` one recipe. Recipes are enumerated by `cases`, and drawn from `strategies` (each searched with
    `examples` of them).
    """

    name: str
    says: str
    check: Check
    strategies: Callable[[Trial], list[st.SearchStrategy]] | None = None
    cases: Callable[[Trial], Iterator[Recipe]] | None = None
    examples: int = 4  # of each strategy, and at least two of each variant
    once: bool = False  # about the process rather than about numbers: few examples at every level
    slow: bool = False  # cases are large, and none of them is left out

    def tries(self, trial: Trial) -> int:
        """Examples at the quick level."""
        variants = (
            len(trial.family.variants(trial.op, trial.manifest))
            if self.strategies is not each_variant and not self.once
            else 1
        )
        return max(self.examples, 2 * variants)

    def count(self, trial: Trial) -> int:
        """Examples of each strategy at the level of the trial."""
        return max(1, int(self.tries(trial) * self.times(trial.level)))

    def times(self, level: str) -> float:
        """How many times as many at that level."""
        return min(1, LEVELS[level]) if self.once else LEVELS[level]


def each_variant(trial: Trial) -> list[st.SearchStrategy]:
    """One search for every kind of weight and every mode."""
    return [_recipe(trial, [v]) for v in trial.family.variants(trial.op, trial.manifest)]


def any_variant(**more: st.SearchStrategy) -> Callable[[Trial], list[st.SearchStrategy]]:
    """One search over all of them, with more to draw."""
    return lambda trial: [_recipe(trial, trial.family.variants(trial.op, trial.manifest), **more)]


def _recipe(trial: Trial, variants: list[Recipe], **more: st.SearchStrategy) -> st.SearchStrategy:
    drawn = {**trial.family.recipe(trial.op, trial.manifest), **more}
    return st.builds(lambda v, d: {**v, **d}, st.sampled_from(variants), st.fixed_dictionaries(drawn))


# --- form and equality --------------------------------------------------------------------------------------


def form(trial: Trial, r: Recipe) -> Mismatch | None:
    """Results as many as the reference's, of its shapes and dtypes; whether they are right is for others."""
    args = trial.build(r)
    try:
        wrong = trial.judge(args, trial(*args))
    except KernelEnded:
        raise
    except KernelRaised as error:
        wrong = Mismatch(f"raised {error}"[:300], breaks=FORM)
    if wrong is None or wrong.breaks != FORM:
        return None
    return wrong._replace(what=f"{wrong.what}; the reference is {trial.signature()}"[:600])


def something_first(trial: Trial) -> Iterator[Recipe]:
    """The edges, and those with nothing in them last: the first that breaks the form is the one that its
    author is shown.
    """
    empty = []
    for r in edges(trial):
        if all(a.size for a in leaves(trial.build(r))):
            yield r
        else:
            empty.append(r)
    yield from empty


def equal(trial: Trial, r: Recipe) -> Mismatch | None:
    """Bits, bound or a defensible choice: what the family demands."""
    args = trial.build(r)
    return trial.judge(args, trial(*args))


def edges(trial: Trial) -> Iterator[Recipe]:
    """No tokens, one, one block, ragged edges."""
    yield from trial.family.edges(trial.op, trial.manifest)


def _forms(trial: Trial) -> Iterator[Recipe]:
    """All edges; at the smoke level, where `edges` comes soon, one of each variant, which is not empty."""
    yield from _last_edges(trial) if trial.level == "smoke" else something_first(trial)


def large(trial: Trial) -> Iterator[Recipe]:
    """Enough work for several threads; not for Triton's interpreter, which has none and would take
    minutes.
    """
    if trial.manifest.concurrent:
        yield from (
            r for r in trial.family.large(trial.op, trial.manifest) if r.get("kind") is None or trial.takes(r)
        )


def after_nan(trial: Trial, r: Recipe) -> Mismatch | None:
    """As `equal`, but a call with NaN for numbers comes before, of more work where there is such: nothing of
    what a kernel keeps in memory from one call to the next may pass for numbers of this call.
    """
    variant = {name: r[name] for name in ("kind", "activations") if name in r}
    more = next((one for one in large(trial) if variant.items() <= one.items()), r)
    first, *rest = trial.build(more)
    if not trial.brief and isinstance(first, np.ndarray) and first.dtype == np.float32:
        spoilt = np.full_like(first, np.nan), *rest
        with suppress(KernelRaised):
            trial.raw(*arrays.to_kernel(spoilt, trial.manifest))
    return equal(trial, r)


# --- metamorphic laws ---------------------------------------------------------------------------------------


def metamorphic(name: str) -> Check:
    """The family's relations of that name."""

    def check(trial: Trial, r: Recipe) -> Mismatch | None:
        args = trial.build(r)
        hook = trial.family.relations[name]
        for found in hook(trial.op, args, np.random.default_rng(r["more_seed"]), trial.manifest):
            one = _related if isinstance(found, Relation) else _parts if name == "split_k" else _reached
            if wrong := one(trial, args, found):
                return wrong
        return None

    return check


def _related(trial: Trial, args: tuple, relation: Relation) -> Mismatch | None:
    args = args if relation.first is None else relation.first
    one, other = trial(*args), trial(*relation.args)
    backs = relation.back if isinstance(relation.back, tuple) else (relation.back,) * len(one)
    for y, z, back, bound in zip(one, other, backs, _bounds(trial, args, relation, backs)):
        if wrong := _alike(back(z), relation.view(y), bound):
            return wrong
    return None


def _bounds(trial: Trial, args: tuple, relation: Relation, backs: tuple) -> list[np.ndarray]:
    """How far the two sides may be apart."""
    if relation.exact or not trial.family.truth:
        return [np.zeros(1)] * len(backs)
    sides = zip(trial.slack(args), trial.slack(relation.args), backs)
    return [relation.view(a) + back(b) for a, b, back in sides]


def _alike(got: np.ndarray, want: np.ndarray, bound: np.ndarray) -> Mismatch | None:
    """Equal numbers (a zero of either sign is a zero), or within the bounds of both."""
    if got.dtype == np.float32 and want.dtype == np.float32:
        return within(got, want.astype(np.float64), bound)
    return same_bits(got, want, nan="any")


def _parts(trial: Trial, args: tuple, parts: tuple[tuple, tuple]) -> Mismatch | None:
    whole, low, high = (trial(*a)[0] for a in (args, *parts))
    bounds = [trial.slack(a)[0] for a in (args, *parts)]
    return within(whole, low.astype(np.float64) + high, bounds[0] + bounds[1] + bounds[2])


def _reached(trial: Trial, args: tuple, reach: Reach) -> Mismatch | None:
    last = slice(-len(reach.masks), None)  # of act_quant only the scales are asked for
    clean, got, slack = (results[last] for results in (trial(*args), trial(*reach.args), trial.slack(args)))
    for y, z, mask, bound in zip(clean, got, reach.masks, slack):
        if z.shape != mask.shape:
            return Mismatch(f"the result has shape {list(z.shape)}, not {list(mask.shape)}")
        missed = [tuple(int(i) for i in at) for at in np.argwhere(mask & np.isfinite(z))]
        if missed:
            return Mismatch(
                f"a NaN or an infinity does not show in {len(missed)} results that it must reach",
                missed[0],
                shown(z[missed[0]]),
                "nothing finite",
            )
        if wrong := within(np.where(mask, y, z), y.astype(np.float64), 2 * bound):
            return wrong._replace(what="a result that it must not reach has changed: " + wrong.what)
    return None


# --- robustness ---------------------------------------------------------------------------------------------


def layouts(trial: Trial, r: Recipe) -> Mismatch | None:
    """Arguments with the same numbers, but strided, padded, misaligned or read-only: all arrays, then each
    alone, since kernels may look at one of them and take it for all, such as the codes of a weight beside
    its scales.
    """
    args, name = trial.build(r), r["layout"]
    alone = _laid_alone(trial, len(leaves(args)), r)
    laid = (arrays.one_laid_out(args, name, which) for which in alone)
    return trial.judge_each(args, (trial(*a) for a in chain([laid_out(args, name)], laid)))


ALONE = 7
"""Arrays that are laid out alone in one case, where arguments have no more."""
FEW = 1
"""Beside the first, of arguments that have more, such as lists of experts, in turn; and in an interpreter."""


def _laid_alone(trial: Trial, count: int, r: Recipe) -> list[int]:
    """Which arrays of so many, the first always; of a reference that alone."""
    if count < 2 or trial.brief:
        return [0][: count - 1]
    every = -(-count // FEW) if count > ALONE or not trial.manifest.concurrent else 1
    turn = list(arrays.LAYOUTS).index(r["layout"]) + sum(map(ord, str(r)))
    return [i for i in range(count) if not i or (i + turn) % every == 0]


def between_pages(trial: Trial, r: Recipe) -> Mismatch | None:
    """All arguments directly before, or behind, pages that end the process when they are touched."""
    args = trial.build(r)
    return trial.judge(args, trial(*guarded.guarded(args, r["closed"])))


def _guarded_cases(trial: Trial) -> Iterator[Recipe]:
    """Only in a process of its own; a GPU's memory has no such pages."""
    on_host = trial.manifest.array == "numpy" or trial.manifest.device == "cpu"
    if trial.isolated and on_host and guarded.possible():
        for r in [*_last_edges(trial), *large(trial)]:
            yield from ({**r, "closed": end} for end in guarded.ENDS)


STRESS = {"full": 5_000, "exhaustive": 50_000}
"""Calls of the law `stress`, at the levels that have it."""


def _stress_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.level in STRESS:
        for r in [*large(trial)][:3]:
            yield {**r, "calls": STRESS[trial.level]}


def stress(trial: Trial, r: Recipe) -> Mismatch | None:
    """One call thousands of times, with as many threads as there are: a race may lose once in so many."""
    args = arrays.to_kernel(trial.build(r), trial.manifest)
    first = [np.copy(y) for y in trial.numpy(trial.raw(*args))]
    for call in range(r["calls"]):
        for y, z in zip(first, trial.numpy(trial.raw(*args))):
            if wrong := same_bits(z, y, nan="any"):
                return wrong._replace(what=f"call {call} of the same: {wrong.what}")
    return None


def unmodified(trial: Trial, r: Recipe) -> Mismatch | None:
    """Inputs are as they were, in the kernel's own arrays."""
    args = arrays.to_kernel(copy(trial.build(r)), trial.manifest)
    before = contents(_seen(args))
    trial.raw(*args)
    changed = [i for i, (a, b) in enumerate(zip(before, contents(_seen(args)))) if a != b]
    return Mismatch(f"input array {changed[0]} was written to") if changed else None


def _seen(value: Any) -> Any:
    """Tensors as numpy, through weights and lists."""
    if hasattr(value, "detach"):
        import torch  # there are tensors, so that it is loaded

        value = value.detach().cpu()
        return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_seen, value))
    return type(value)(map(_seen, value)) if isinstance(value, tuple | list) else value


def fresh(trial: Trial, r: Recipe) -> Mismatch | None:
    """A result belongs to its caller, and to these numbers: not to their address, nor to memory that an
    earlier call left.
    """
    args, other = trial.build(r), trial.build(reseeded(r, r["more_seed"]))
    mine = arrays.to_kernel(copy(args), trial.manifest)
    first = trial.raw(*mine)
    kept = [np.copy(y) for y in trial.numpy(first)]
    _poison(kept, trial.manifest)
    if wrong := trial.judge(other, trial(*other)):
        return wrong
    if any(y.tobytes() != k.tobytes() for y, k in zip(trial.numpy(first), kept)):
        return Mismatch("a later call changed the result of an earlier one")
    for which in [i for i, a in enumerate(mine) if arrays.leaves(a)]:
        args = _refill(mine, args, which)
        if wrong := trial.judge(args, trial.numpy(trial.raw(*mine))):
            said = "after its inputs" if not which else f"after argument {which}, counted from 0,"
            return wrong._replace(what=f"{said} were changed in place: {wrong.what}")
    return None


def _poison(like: list[np.ndarray], m: Manifest) -> None:
    """Free memory of these sizes, full of NaN, for the next allocation to find."""
    held = [arrays.to_kernel(np.full(y.size, np.nan, np.float32), m) for y in like for _ in range(8)]
    del held


def _turned(a: np.ndarray) -> np.ndarray:
    """`a` with its numbers in reverse order; of rows of bytes only the rows, so that blocks stay whole."""
    whole = a.dtype == np.uint8 and a.ndim > 1
    return np.flip(a, axis=tuple(range(a.ndim - whole))).copy()


def _refill(mine: tuple, args: tuple, which: int) -> tuple:
    """Turn the arrays of one argument around in place, in the kernel's memory; the arguments as they now
    are.
    """
    turned = arrays.tree_map(_turned, args[which])
    for held, new in zip(arrays.leaves(mine[which]), arrays.leaves(turned)):
        held[...] = arrays.to_kernel(new, Trial.of_array(held))
    return (*args[:which], turned, *args[which + 1 :])


def repeat(trial: Trial, r: Recipe) -> Mismatch | None:
    """Ten calls give the same bits."""
    args = trial.build(r)
    first = trial(*args)
    for _ in range(9):
        for y, z in zip(first, trial(*args)):
            if wrong := same_bits(z, y, nan="any"):
                return wrong._replace(what="the same call again: " + wrong.what)
    return None


CALLS = {1: 1, 2: 4, 3: 4, 16: 4}
"""Of a case, by the number of threads: where there are more of them than cores, one is interrupted at its
work only now and then.
"""


def threads(trial: Trial, r: Recipe) -> Mismatch | None:
    """One, two, three and many threads give the same bits, and right ones."""
    if "real" in r:
        return _teams(trial, r)
    args, results = trial.build(r), []
    with thread_counts.kept():
        for n in thread_counts.COUNTS:
            ops.set_threads(n)
            results.append(trial(*args))
    if r.get("kind") == "plain" or r.get("activations") == "exact":
        # Maybe BLAS's own product, which promises no bits: right with each number.
        return next((bad for y in results if (bad := trial.judge(args, y))), None)
    for n, result in zip(thread_counts.COUNTS[1:], results[1:]):
        for y, z in zip(results[0], result):
            if wrong := same_bits(z, y, nan="any"):
                return wrong._replace(what=f"with {n} threads instead of one: " + wrong.what)
    return trial.judge(args, results[0])


def _teams(trial: Trial, r: Recipe) -> Mismatch | None:
    """The same at a real size, where the truth is known to the bit, or nearly, of experts' random numbers."""
    with thread_counts.kept():
        for n in thread_counts.COUNTS:
            ops.set_threads(n)
            for call in range(CALLS[n]):  # other numbers in turn: what a call left must not pass for the next
                if wrong := real_sizes.check(trial, {**r, "seed": r["seed"] + call % 2}):
                    return wrong._replace(what=f"with {n} threads, call {call}: {wrong.what}")
    return None


def _thread_cases(trial: Trial) -> Iterator[Recipe]:
    """Enough work for several threads, and work of real sizes; below the full level less for references and
    rewrites of them, which share no work among threads of their own.
    """
    if trial.level == "smoke" and trial.brief:
        return
    if trial.level == "full" or not trial.brief:
        yield from real_sizes.cases("threads")(trial)
    yield from large(trial)


BUSY_S, ROOM = 0.05, 2**24
"""How long each thread of the law `concurrent` goes on, as a call of microseconds seldom meets another, and
bytes that its results may take.
"""


def concurrent(trial: Trial, r: Recipe) -> Mismatch | None:
    """Called from four threads at once, each with its own numbers, again and again."""
    jobs = [trial.build(reseeded(r, (r["more_seed"] + i) % 2**32)) for i in range(4)]
    alone = [trial(*args) for args in jobs]
    got: list[Any] = [None] * len(jobs)
    gate, interval = threading.Barrier(len(jobs)), sys.getswitchinterval()
    most = ROOM // (1 + sum(y.nbytes for y in alone[0]))

    def run(i: int) -> None:
        gate.wait()
        end = time.monotonic() + BUSY_S * (not trial.brief)
        results: list[tuple] = []
        try:  # nothing is compared meanwhile: the more of the time is the kernel's
            while len(results) < 2 or (len(results) < most and time.monotonic() < end):
                results.append(trial(*jobs[i]))
            got[i] = results
        except Exception as error:
            got[i] = error

    workers = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    try:
        sys.setswitchinterval(1e-5)
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    finally:
        sys.setswitchinterval(interval)
    for want, results in zip(alone, got):
        if isinstance(results, Exception):
            return Mismatch(f"called from several threads it raised {results!r}")
        for result in results:
            if wrong := next(
                (bad for y, z in zip(want, result) if (bad := same_bits(z, y, nan="any"))), None
            ):
                return wrong._replace(what="called from several threads: " + wrong.what)
    return None


def _concurrent_cases(trial: Trial) -> Iterator[Recipe]:
    """Three of the last edges, evenly spread, or as often as it takes."""
    found = [r for r in _with_more(trial) if r.get("activations") in (None, trial.manifest.modes[0])]
    yield from ({**found[i * len(found) // 3], "more_seed": i} for i in range(3 if found else 0))


def out(trial: Trial, r: Recipe) -> Mismatch | None:
    """With `out` given: every element written, nothing beside it."""
    args = trial.build(r)
    like = trial(*args)[0]
    pad = 64
    memory = (
        np.full(like.size + 2 * pad, np.nan, np.float32)
        if like.dtype == np.float32
        else np.full(like.size + 2 * pad, 0xA5, like.dtype)
    )
    canary = memory.copy()
    target = memory[pad : pad + like.size].reshape(like.shape)
    trial.raw(*arrays.to_kernel(args, trial.manifest), out=target)
    if memory[:pad].tobytes() != canary[:pad].tobytes() or memory[-pad:].tobytes() != canary[-pad:].tobytes():
        return Mismatch("memory beside the output was written to")
    return trial.judge(args, (target, *trial(*args)[1:]))


def far(trial: Trial, r: Recipe) -> Mismatch | None:
    """Rows of x, then of the weight, so far apart that the last is beyond 2^31 elements: three, which small
    machines have room for.
    """
    args = trial.build({**r, **{name: _few(r[name]) for name in ("tokens", "rows") if name in r}})
    for i, a in enumerate(args[:2]):
        if any(map(arrays.few_rows, arrays.leaves(a))):
            apart = (*args[:i], arrays.far_apart(a), *args[i + 1 :])
            if wrong := trial.judge(args, trial(*apart)):
                return wrong
    return None


def _far_cases(trial: Trial) -> Iterator[Recipe]:
    yield from _last_edges(trial)


def _few(rows: Any) -> Any:
    return rows[: arrays.FAR_ROWS] if isinstance(rows, list) else min(rows, arrays.FAR_ROWS)


# --- the list -----------------------------------------------------------------------------------------------


def _allowed(trial: Trial) -> tuple[str, ...]:
    return trial.manifest.layouts or (
        tuple(arrays.LAYOUTS) if trial.manifest.array == "numpy" else arrays.OF_TENSORS
    )


def _with_layout(trial: Trial) -> list[st.SearchStrategy]:
    return any_variant(layout=st.sampled_from(_allowed(trial)))(trial)


def _each_layout(trial: Trial) -> Iterator[Recipe]:
    """Every layout of some inputs with several rows, of every variant; at the smoke level every layout of one
    variant or more, and every variant in one layout or more.
    """
    found = _last_edges(trial)
    apart = min(len(_allowed(trial)), len(found)) if trial.level == "smoke" else 1
    for i, r in enumerate(found):
        # Of matrices two layouts are the same.
        deep = any(a.ndim > 2 for a in leaves(trial.build(r)))
        names = [name for name in _allowed(trial) if deep or name != arrays.EXCHANGED]
        yield from ({**r, "layout": name} for j, name in enumerate(names) if (i - j) % apart == 0)


def _last_edges(trial: Trial) -> list[Recipe]:
    """The last of each of an operation's variants; where it has none the last two edges, and the last of each
    kind, such as of attention to chosen rows: a kind has fields of its own.
    """
    found, variants = [*edges(trial)], trial.family.variants(trial.op, trial.manifest)
    if len(variants) < 2:
        if not trial.manifest.concurrent:  # in an interpreter, where all are slow
            # One token alone often has a kernel of its own.
            return [r for r in found[:-2] if r.get("tokens") == 1][-1:] + found[-2:]
        kinds = {frozenset(r): r for r in found[:-2]}
        last = {frozenset(r) for r in found[-2:]}
        return [*(r for kind, r in kinds.items() if kind not in last), *found[-2:]]
    return [[r for r in found if v.items() <= r.items()][-1] for v in variants]


def _with_more(trial: Trial) -> Iterator[Recipe]:
    yield from ({**r, "more_seed": 0} for r in _last_edges(trial))


_ANY, _MORE = any_variant(), any_variant(more_seed=SEEDS)
_META = {
    "power_of_two": "scaling inputs by a power of two scales the result exactly",
    "permutation": "blocks, rows, heads or experts in another order give the same, in that order",
    "batch": "a batch is the stack of its rows",
    "split_k": "two parts of K add up to the whole",
    "nan_reach": "a NaN or an infinity reaches exactly the results it must",
    "causal": "later tokens do not reach earlier ones",
    "unread": "an expert nobody chose is not read",
}
_FIXED = {
    "exhaustive": "small domains are enumerated",
    "one_hot": "x = e_k gives column k",
    "integers": "where everything is an integer there is no error at all",
    "large_offset": "offsets beyond 2^31 bytes",
}
_REAL = {
    "dyadic": "at real sizes, where no partial sum rounds, the same bits whatever the order",
    "real_sizes": "at real sizes, within the bound of random numbers; counts beyond 16 bits",
}

LADDER: tuple[Law, ...] = (
    Law(
        FORM,
        "results have the reference's number, shapes and dtypes, and no call raises",
        form,
        cases=_forms,
    ),
    Law("survives", "no call ends or crashes the process, or fills its memory", equal),
    Law("returns", "every call ends within the time that it is given", equal),
    Law("bits", "the same bits on arbitrary inputs", equal, each_variant, examples=24),
    Law(
        "bound",
        "every element within the derived bound of the float64 truth",
        equal,
        each_variant,
        examples=8,
    ),
    Law(
        "edges",
        "no tokens, one, one block, ragged edges, also after a call that left NaN behind",
        after_nan,
        cases=edges,
    ),
    *(Law(n, says, exhaustive.check, cases=exhaustive.cases(n)) for n, says in _FIXED.items()),
    *(Law(n, says, real_sizes.check, cases=real_sizes.cases(n), slow=True) for n, says in _REAL.items()),
    Law(
        extremes.LAW,
        "quants at their ends, sums beyond 16 bits, numbers beyond halves, scales that are none",
        extremes.check,
        cases=extremes.cases,
        slow=True,
    ),
    *(Law(n, says, metamorphic(n), _MORE, _with_more, examples=10) for n, says in _META.items()),
    Law(
        "layouts",
        "strided, padded, misaligned and read-only inputs",
        layouts,
        _with_layout,
        _each_layout,
        examples=12,
    ),
    Law(
        "far_rows",
        "rows so far apart that the last is beyond 2^31 bytes and elements",
        far,
        _ANY,
        _far_cases,
        examples=3,
        once=True,
    ),
    Law(
        "guarded",
        "nothing beside the inputs is touched: they lie between pages that end the process",
        between_pages,
        cases=_guarded_cases,
        slow=True,
    ),
    Law("unmodified", "inputs are not written to", unmodified, _ANY, examples=4),
    Law(
        "fresh",
        "results belong to their caller and to the numbers, not to addresses",
        fresh,
        _MORE,
        examples=8,
    ),
    Law("repeat", "ten calls give the same bits", repeat, _ANY, examples=2, once=True),
    Law(
        "threads",
        "1, 2, 3 and many threads give the same bits",
        threads,
        _ANY,
        _thread_cases,
        examples=3,
        once=True,
    ),
    Law(
        "stress",
        "thousands of calls give the same bits, from the full level on",
        stress,
        cases=_stress_cases,
        slow=True,
    ),
    Law(
        "concurrent",
        "calls from several threads at once do not disturb each other",
        concurrent,
        _MORE,
        _concurrent_cases,
        examples=2,
        once=True,
    ),
    Law("out", "an output that is passed in is filled, and nothing beside it", out, _ANY, examples=3),
    Law(WAYS, "every way that a kernel declares, and this machine can take, was entered", equal),
)
LAWS = {law.name: law for law in LADDER}


def applying(trial: Trial) -> list[Law]:
    """The laws that hold for an operation: by its demand, its family's relations, and what its manifest
    takes.
    """
    family: Family = trial.family
    always = {FORM, "edges", "layouts", "unmodified", "fresh", "repeat", "guarded", "stress"} | family.laws()
    always |= {"bits" if ops.OPS[trial.op].equal == "bits" else "bound"}
    always |= {"concurrent"} if trial.manifest.concurrent else set()
    always = always | {"threads"} if trial.manifest.threads else always - {"threads"}
    always |= {"out"} if trial.takes_parameter("out") else set()
    always |= (
        {"far_rows"}
        if arrays.has_room(trial.manifest) and family.fixed.get("large_offset") is None
        else set()
    )
    always -= set() if trial.manifest.shows_nan else {"nan_reach"}
    return [law for law in LADDER if law.name in always and _has_inputs(law, trial)]


def _has_inputs(law: Law, trial: Trial) -> bool:
    if law.strategies:
        return bool(trial.family.variants(trial.op, trial.manifest))
    return law.cases is not None and next(law.cases(trial), None) is not None
