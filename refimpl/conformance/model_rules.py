"""What a model does between its operations, under laws of its own: tables of positions, the scale of
attention, positions after a cut, sampling, and where a generation stops.

    python -m refimpl.conformance --op model
    python -m refimpl.conformance --op model --kernel mine:functions

Judged is an object, a module for instance, with some of the functions of `JudgedModel`; those that it lacks
are this project's. Truth is written here once more, from the papers' formulas, number by number.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from refimpl import generate
from refimpl.config import DeepSeekConfig, YarnScaling
from refimpl.conformance.manifest import Expected
from refimpl.conformance.truth.bounds import EXP, gamma
from refimpl.conformance.truth.compare import Mismatch, within
from refimpl.conformance.verdict import LEVELS, Verdict
from refimpl.errors import refusal
from refimpl.generate import Sampling
from refimpl.reference import attention

NAME = "model"
Recipe = dict[str, Any]
Before = Callable[[str, str], None]
Told = Callable[[Verdict], None]


@dataclass(frozen=True)
class JudgedModel:
    """The functions that are judged."""

    rope_tables: Callable[..., Any] = attention.rope_tables
    softmax_scale: Callable[..., Any] = attention.softmax_scale
    probabilities: Callable[..., Any] = generate.probabilities
    draw: Callable[..., Any] = generate.draw
    session: Callable[..., Any] = generate.Session
    stop_ids: Callable[[DeepSeekConfig], Any] = lambda c: c.stop_ids

    @classmethod
    def of(cls, given: Any) -> JudgedModel:
        """With the functions that `given` has."""
        fields = cls.__dataclass_fields__
        return cls(**{name: getattr(given, name) for name in fields if hasattr(given, name)})


def _config(r: Recipe) -> DeepSeekConfig:
    """A model's configuration of a recipe."""
    yarn = YarnScaling(**r["yarn"]) if r["yarn"] else None
    sizes = {"qk_rope_head_dim": r["dim"], "qk_nope_head_dim": r["nope"], "rope_theta": r["theta"]}
    return replace(DeepSeekConfig(), **sizes, rope_scaling=yarn)


def _configs(seed: int) -> Iterator[Recipe]:
    """DeepSeek-V3's, one without YaRN, and some more."""
    rng = np.random.default_rng(seed)
    v3 = {"dim": 64, "nope": 128, "theta": 10000.0}
    yield {**v3, "yarn": {"mscale_all_dim": 1.0}}
    yield {**v3, "yarn": None}
    while True:
        yarn = {
            "factor": float(rng.choice([1.0, 2.0, 4.0, 40.0])),
            "original_max_position_embeddings": int(rng.choice([512, 4096, 32768])),
            "beta_fast": float(rng.choice([16, 32, 64])),
            "beta_slow": float(rng.choice([1, 2])),
            "mscale": float(rng.choice([0.0, 0.707, 1.0])),
            "mscale_all_dim": float(rng.choice([0.0, 0.707, 1.0])),
        }
        dims = {"dim": int(rng.choice([2, 8, 64, 96])), "nope": int(rng.choice([16, 128, 192]))}
        yield {**dims, "theta": float(rng.choice([1e4, 5e4, 1e6])), "yarn": yarn}


def _temperature(yarn: YarnScaling, mscale: float) -> float:
    """YaRN's, equation 22 of arXiv 2309.00071 with DeepSeek's factor."""
    return 1.0 if yarn.factor <= 1 or not mscale else 0.1 * mscale * math.log(yarn.factor) + 1.0


def _turn(c: DeepSeekConfig, pair: int) -> float:
    """Radians a position of one pair."""
    plain, yarn = c.rope_theta ** (-2 * pair / c.qk_rope_head_dim), c.rope_scaling
    if yarn is None:
        return plain
    half = c.qk_rope_head_dim / (2 * math.log(c.rope_theta))
    fast, slow = (
        half * math.log(yarn.original_max_position_embeddings / (beta * 2 * math.pi))
        for beta in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), c.qk_rope_head_dim - 1)
    slowed = min(max((pair - low) / (high - low or 0.001), 0.0), 1.0)
    return plain * ((1 - slowed) + slowed / yarn.factor)


def _tables(m: JudgedModel, r: Recipe) -> Mismatch | None:
    """Cosines and sines of near and far positions."""
    c = _config(r)
    positions = np.array([0, 1, 2, 5, 100, 4095, 4096, 30000, 163839])
    turns = np.array([_turn(c, i) for i in range(c.qk_rope_head_dim // 2)])
    angles, yarn = positions[:, None] * turns, c.rope_scaling
    size = _temperature(yarn, yarn.mscale) / _temperature(yarn, yarn.mscale_all_dim) if yarn else 1.0
    error = size * (gamma(3) * angles + gamma(EXP + 2)) + 2.0**-126
    for name, got, f in zip(("cosine", "sine"), m.rope_tables(c, positions), (np.cos, np.sin)):
        if wrong := within(np.asarray(got), size * f(angles), error, name):
            return wrong
    return None


def _scale(m: JudgedModel, r: Recipe) -> Mismatch | None:
    """One over the root of a head's width, times YaRN's temperature for queries and for keys."""
    c = _config(r)
    yarn, true = c.rope_scaling, 1 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)
    true *= _temperature(yarn, yarn.mscale_all_dim) ** 2 if yarn else 1.0
    got = float(m.softmax_scale(c))
    return None if abs(got - true) <= 1e-6 * true else Mismatch("another scale", (), str(got), str(true))


# --- sampling -----------------------------------------------------------------------------------------------


def _samplings(seed: int) -> Iterator[Recipe]:
    rng = np.random.default_rng(seed)
    for min_p in (0.0, 0.05):
        yield {
            "n": 40,
            "seed": 1,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": min_p,
            "ties": False,
        }
    while True:
        yield {
            "n": int(rng.choice([1, 2, 40, 300])),
            "seed": int(rng.integers(2**31)),
            "temperature": float(rng.choice([0.3, 1.0, 2.0])),
            "top_k": int(rng.choice([0, 1, 5, 40])),
            "top_p": float(rng.choice([0.1, 0.5, 0.9, 1.0])),
            "min_p": float(rng.choice([0.0, 0.05, 0.5])),
            "ties": bool(rng.integers(2)),
        }


def _logits(r: Recipe) -> np.ndarray:
    rng = np.random.default_rng(r["seed"])
    size = (r["n"],)
    logits: np.ndarray = rng.integers(-3, 4, size) if r["ties"] else rng.normal(0, 3, size)
    return logits.astype(np.float32)


def _sampling_of(r: Recipe) -> Sampling:
    return Sampling(r["temperature"], r["top_k"], r["top_p"], r["min_p"], seed=r["seed"])


def _true_shares(logits: Sequence[float], s: Sampling) -> tuple[list[float], bool]:
    """What each token is drawn with, and whether no cut is within rounding: one token after another."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = {i: math.exp((logits[i] - logits[order[0]]) / s.temperature) for i in order}
    kept = order[: s.top_k or len(order)]
    whole, passed, clear, left = math.fsum(weights[i] for i in kept), 0.0, True, []
    for i in kept:
        clear = clear and abs(passed / whole - s.top_p) > 1e-9
        if passed / whole >= s.top_p:
            break
        left.append(i)
        passed += weights[i]
    edge = s.min_p * weights[left[0]]
    clear = clear and all(abs(weights[i] - edge) > 1e-9 for i in left)
    left = [i for i in left if weights[i] >= edge]
    whole = math.fsum(weights[i] for i in left)
    return [weights[i] / whole if i in left else 0.0 for i in range(len(logits))], clear


def _sampling(m: JudgedModel, r: Recipe) -> Mismatch | None:
    """Shares of all tokens, and how often each is drawn: seven deviations are off once in 10^11 times."""
    logits, s = _logits(r), _sampling_of(r)
    shares, clear = _true_shares([float(x) for x in logits], s)
    if not clear:
        return None
    true, got = np.array(shares), np.asarray(m.probabilities(logits.copy(), s), np.float64)
    off = np.abs(got - true)
    if got.shape != true.shape or not (off <= 1e-9).all():
        at = int(off.argmax()) if got.shape == true.shape else 0
        return Mismatch("another share of a token", (at,), str(got[at]), str(true[at]))
    rng, draws = np.random.default_rng(r["seed"]), 400
    counts = np.bincount([m.draw(logits.copy(), s, rng) for _ in range(draws)], minlength=len(true))
    far = np.abs(counts - draws * true) > 7 * np.sqrt(draws * true * (1 - true)) + 7 * (true > 0)
    if far.any():
        at = int(far.argmax())
        return Mismatch("drawn too often or too seldom", (at,), str(counts[at]), str(draws * true[at]))
    greedy = m.draw(logits.copy(), replace(s, temperature=0.0), rng)
    best = int(min(np.flatnonzero(logits == logits.max())))
    return None if greedy == best else Mismatch("not the likeliest token", (), str(greedy), str(best))


# --- sessions -----------------------------------------------------------------------------------------------

WORDS = 37


class _Cache:
    """A stand-in for a latent cache that holds the tokens' ids instead of their rows."""

    prefill = 3  # at a time

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def check(self, length: int) -> None:
        pass

    def truncate(self, length: int) -> None:
        del self.tokens[length:]


def _language_model(stops: Any = 1) -> Any:
    """A model whose logits follow from every token before and its position, and from nothing else."""

    def forward(ids: Sequence[int], cache: _Cache, last_only: bool = False) -> np.ndarray:
        cache.tokens += list(ids)
        story = [position * 7919 + token for position, token in enumerate(cache.tokens)]
        return np.random.default_rng(story).normal(0, 1, (1, WORDS)).astype(np.float32)

    config = replace(DeepSeekConfig(), vocab_size=WORDS, max_position_embeddings=60, eos_token_id=stops)
    return SimpleNamespace(config=config, new_cache=_Cache, forward=forward)


def _talks(seed: int) -> Iterator[Recipe]:
    rng = np.random.default_rng(seed)
    while True:
        first = rng.integers(0, WORDS, int(rng.integers(1, 12))).tolist()
        shared = int(rng.integers(0, len(first) + 1))
        more = rng.integers(0, WORDS, int(rng.integers(1, 6))).tolist()
        yield {"first": first, "then": [*first[:shared], *more], "shorter": first[: max(1, shared)]}


def _positions(m: JudgedModel, r: Recipe) -> Mismatch | None:
    """A prompt after another, of which a part is kept: the logits are those of a new session."""
    session = m.session(_language_model())
    for name in ("first", "then", "shorter", "first"):
        got = session.prefill(r[name])
        want = m.session(_language_model()).prefill(r[name])
        if got.tobytes() != want.tobytes():
            return Mismatch(f"after a cut, the logits of {name} are not those of a new session")
    return None


def _stop_cases(seed: int) -> Iterator[Recipe]:
    rng = np.random.default_rng(seed)
    for stops in (1, None, [3], [5, 7, 11]):
        yield {"stops": stops, "seed": 0, "room": 50}
    while True:
        stops = rng.choice(WORDS, int(rng.integers(1, 6)), replace=False).tolist()
        yield {"stops": stops, "seed": int(rng.integers(2**31)), "room": int(rng.integers(1, 56))}


def _stops(m: JudgedModel, r: Recipe) -> Mismatch | None:
    """Any of the model's stop ids ends a generation and is its last token; else what is asked for, or the
    context, does.
    """
    stops = tuple(r["stops"]) if isinstance(r["stops"], list) else r["stops"]
    model = _language_model(stops)
    wanted = set(stops) if isinstance(stops, tuple) else set() if stops is None else {stops}
    found = m.stop_ids(model.config)
    if set(found) != wanted:
        return Mismatch("other stop ids", (), str(sorted(found)), str(sorted(wanted)))
    prompt, s = [2, 4, 6], Sampling(1.5, seed=r["seed"])
    got = list(m.session(model).generate(prompt, s, r["room"], frozenset(found)))
    most = min(r["room"], model.config.max_position_embeddings - len(prompt))
    early = [i for i, token in enumerate(got[:-1]) if token in wanted]
    ended = len(got) == most or bool(got and got[-1] in wanted)
    if early or len(got) > most or not ended:
        return Mismatch("the generation does not end where it must", (), str(got), f"at most {most} tokens")
    return None


@dataclass(frozen=True)
class Rule:
    """A law of the model: what it says, its cases, and whether one is kept."""

    says: str
    cases: Callable[[int], Iterator[Recipe]]
    check: Callable[[JudgedModel, Recipe], Mismatch | None]
    count: int = 40  # at the quick level


RULES = {
    "tables": Rule("cosines and sines are those of the paper, YaRN's too", _configs, _tables),
    "scale": Rule("attention is scaled by its width and YaRN's temperature", _configs, _scale),
    "sampling": Rule(
        "tokens are drawn as often as temperature, top_k, top_p and min_p say", _samplings, _sampling
    ),
    "positions": Rule("after a cut, tokens have the positions that they would have", _talks, _positions),
    "stops": Rule("every stop id ends a generation, and nothing else does", _stop_cases, _stops),
}


def attempt(m: JudgedModel, law: str, recipe: Recipe) -> Mismatch | None:
    """One case. What a function raises is a mismatch too."""
    try:
        return RULES[law].check(m, recipe)
    except Exception as error:
        return Mismatch(f"raised {type(error).__name__}: {error}"[:300])


def again(given: Any, law: str, case: str) -> Mismatch | None:
    """Try one case, a JSON object; InputFormatError E8004 for anything else."""
    try:
        recipe = json.loads(case)
    except json.JSONDecodeError as error:
        raise refusal("E8004", "--case", found=case[:60]) from error
    return attempt(JudgedModel.of(given), law, recipe)


def reproduce(label: str, law: str, case: str) -> str:
    """The command that tries that one case again."""
    which = f"--kernel {label} " if ":" in label else ""
    return f"python -m refimpl.conformance --op {NAME} {which}--law {law} --case '{case}'"


def judge(
    given: Any = None,
    label: str = "reference",
    level: str = "quick",
    number: int = 0,
    laws: Sequence[str] | None = None,
    expected: Expected | None = None,
    before: Before = lambda law, case: None,
    told: Told = lambda v: None,
) -> list[Verdict]:
    """A verdict for each law. `before` is called with each case that is about to be tried, `told` with each
    verdict.
    """
    model, found = JudgedModel.of(given), []
    for law, rule in RULES.items():
        if laws and law not in laws:
            continue
        begun, verdict = time.perf_counter(), Verdict(NAME, label, law, True, 0, 0.0)
        for _, recipe in zip(range(max(4, int(rule.count * LEVELS[level]))), rule.cases(number)):
            case = json.dumps(recipe, separators=(",", ":"))
            before(law, case)
            verdict.examples += 1
            if wrong := attempt(model, law, recipe):
                verdict.passed, verdict.case, verdict.why = False, case, wrong.what
                verdict.where, verdict.got, verdict.want = list(wrong.where), wrong.got, wrong.want
                verdict.bound, verdict.times = wrong.bound, wrong.times
                verdict.expected = (expected or Expected()).reason(NAME, law)
                verdict.reproduce = reproduce(label, law, case)
                break
        verdict.seconds = time.perf_counter() - begun
        found.append(verdict)
        told(verdict)
    return found
