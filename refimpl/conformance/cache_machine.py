"""The latent KV cache against a list of tokens: whatever was prefilled, decoded, truncated, interrupted or
reset before, a pass sees what a pass from scratch would see, to the bit, and attends to it within the bound
of attention.

Judged is a function that makes caches as `refimpl.cache.LatentCache` does, from a config: `reserve`,
`extend`, `advance`, `truncate`, `length`. A cache that rounds what it keeps says so by a method `stored`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from refimpl.cache import LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.compare import Mismatch, same_bits, within
from refimpl.conformance.verdict import LEVELS, Verdict
from refimpl.errors import ResourceError, refusal
from refimpl.reference.attention import mla_absorbed

NAME, LAW = "latent_cache", "stateful"
ROWS = {"reference": "refimpl.cache:LatentCache", "cuda": "refimpl.conformance.device_cache:OfTensors"}
"""Our own, by backend."""
CONFIG = DeepSeekConfig(
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=512,  # with the key behind it, more than one program writes of a row
    qk_nope_head_dim=4,
    qk_rope_head_dim=64,
    v_head_dim=4,
    max_position_embeddings=300,  # more than any cache has room for at first
)
Before = Callable[[str, str], None]
Step = list  # ["prefill", 3], ["truncate", 2], ...
STEPS = ("prefill", "decode", "interrupt", "truncate", "reset")
FULL = CONFIG.max_position_embeddings
STORIES: list[list[Step]] = [
    [[what, *map(int, n)] for what, *n in map(str.split, story.split(", "))]
    for story in (
        # to the brim
        f"prefill {FULL - 1}, prefill 2, decode, decode, truncate {FULL - 1}, decode, decode, reset, "
        f"prefill {FULL + 1}, decode",
        # old rows behind a cut
        "prefill 60, decode, prefill 195, decode, prefill 8, truncate 61, interrupt 5, "
        "prefill 3, truncate 1, decode, reset, prefill 2",
    )
]
"""What every cache goes through before hypothesis makes up more: limits it would rarely come to."""


def _numbers(token: int, position: int, layer: int) -> np.random.Generator:
    return np.random.default_rng([token, position, layer])


def row(token: int, position: int, layer: int) -> np.ndarray:
    """What this token leaves in the cache: f32 [L + r]."""
    return (
        _numbers(token, position, layer)
        .normal(0, 1, CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim)
        .astype(np.float32)
    )


class Conversation:
    """A cache, and the tokens that should be in it."""

    def __init__(self, make: Callable[[DeepSeekConfig], Any]):
        self.cache, self.tokens, self.next = make(CONFIG), [], 0  # type: ignore[var-annotated]
        self.stored: Callable[[np.ndarray], np.ndarray] = getattr(self.cache, "stored", lambda x: x)
        shape = 2, CONFIG.qk_nope_head_dim + CONFIG.v_head_dim, CONFIG.kv_lora_rank
        self.kv_b = np.random.default_rng(1).normal(0, 0.1, shape).astype(np.float32)

    def step(self, what: str, n: int = 0) -> Mismatch | None:
        """Do it to both, and compare."""
        return {
            "prefill": self._pass,
            "decode": lambda n: self._pass(1),
            "interrupt": self._interrupt,
            "truncate": self._truncate,
            "reset": self._truncate,
        }[what](n)

    def _new(self, n: int) -> list[int]:
        self.next += n  # no token comes twice, so a stale row cannot pass for a fresh one
        return list(range(self.next - n, self.next))

    def _pass(self, n: int) -> Mismatch | None:
        """All layers of a forward pass over n new tokens."""
        new = self._new(n)
        if len(self.tokens) + n > FULL:
            with suppress(ResourceError):
                self.cache.reserve(n)
                return Mismatch(f"room for {len(self.tokens) + n} tokens in a context of {FULL}")
            return self._length()
        self.cache.reserve(n)
        for layer in range(CONFIG.num_hidden_layers):
            if wrong := self._layer(layer, new):
                return wrong
        self.cache.advance(n)
        self.tokens += new
        return self._length()

    def _layer(self, layer: int, new: list[int]) -> Mismatch | None:
        rows = np.array([row(t, i, layer) for i, t in enumerate(self.tokens + new)], np.float32)
        old, width = len(self.tokens), CONFIG.kv_lora_rank
        latent, k_pe, *count = self.cache.extend(layer, rows[old:, :width], rows[old:, width:])
        rows = self.stored(rows)
        present = count[0] if count and count[0] is not None else len(latent)
        latent, k_pe = latent[:present], k_pe[:present]
        where = f"layer {layer} after {old} and {len(new)} tokens"
        if wrong := same_bits(
            np.ascontiguousarray(latent), rows[:, :width].copy(), name=f"latent of {where}"
        ):
            return wrong
        if wrong := same_bits(
            np.ascontiguousarray(k_pe), rows[:, width:].copy(), name=f"rope key of {where}"
        ):
            return wrong
        q = _numbers(7, old, layer).normal(0, 1, (len(new), 2, CONFIG.qk_head_dim)).astype(np.float32)
        q_nope, q_pe = q[..., : CONFIG.qk_nope_head_dim], q[..., CONFIG.qk_nope_head_dim :]
        true, bound = bounds.attention(
            Manifest(), q_nope, q_pe, rows[:, :width], rows[:, width:], self.kv_b, 0.3
        )
        return within(
            mla_absorbed(q_nope, q_pe, latent, k_pe, self.kv_b, 0.3), true, bound, f"attention of {where}"
        )

    def _interrupt(self, n: int) -> Mismatch | None:
        """A pass that stops after its first layer: the cache is as before."""
        if len(self.tokens) + n <= FULL:
            self.cache.reserve(n)
            if wrong := self._layer(0, self._new(n)):
                return wrong
        return self._length()

    def _truncate(self, n: int) -> Mismatch | None:
        keep = min(n, len(self.tokens))
        self.cache.truncate(keep)
        del self.tokens[keep:]
        return self._length()

    def _length(self) -> Mismatch | None:
        found, want = self.cache.length, len(self.tokens)
        return (
            None
            if found == want
            else Mismatch("the cache has another length than its tokens", got=str(found), want=str(want))
        )


def play(make: Callable[[DeepSeekConfig], Any], steps: list[Step]) -> Mismatch | None:
    """The first step that goes wrong, if any."""
    talk = Conversation(make)
    try:
        return next((wrong for step in steps if (wrong := talk.step(*step))), None)
    except Exception as error:
        return Mismatch(f"raised {type(error).__name__}: {error}"[:300])


def again(make: Callable[[DeepSeekConfig], Any], case: str) -> Mismatch | None:
    """Play one case, a JSON list of steps; InputFormatError E8004 for anything else."""
    try:
        steps = json.loads(case)
        known = all(step[0] in STEPS and all(isinstance(n, int) for n in step[1:]) for step in steps)
    except (json.JSONDecodeError, TypeError, IndexError):
        known = False
    if not known:
        expected = '[["prefill",3],["decode"],...]'
        raise refusal("E8004 steps", "--case", found=case[:60], expected=expected)
    return play(make, steps)


def reproduce(label: str, case: str) -> str:
    """The command that plays that one case again."""
    which = "" if label == "reference" else f"{'--kernel' if ':' in label else '--backend'} {label} "
    return f"python -m refimpl.conformance --op {NAME} {which}--law {LAW} --case '{case}'"


class _Found(Exception):
    pass


def machine(
    make: Callable[[DeepSeekConfig], Any],
    told: list[tuple[list[Step], Mismatch]],
    counted: list[int],
    before: Before,
) -> type[RuleBasedStateMachine]:
    """A state machine of hypothesis that reports what goes wrong to `told`."""

    class Cache(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[Step] = []
            self.talk = Conversation(make)
            counted[0] += 1

        def do(self, *step: Any) -> None:
            self.steps.append(list(step))
            before(LAW, json.dumps(self.steps, separators=(",", ":")))
            try:
                wrong = self.talk.step(*step)
            except Exception as error:
                wrong = Mismatch(f"raised {type(error).__name__}: {error}"[:300])
            if wrong:
                told.append((self.steps, wrong))
                raise _Found

        @rule(n=st.integers(1, 8) | st.integers(60, 90))
        def prefill(self, n: int) -> None:
            self.do("prefill", n)

        @rule()
        def decode(self) -> None:
            self.do("decode")

        @rule(n=st.integers(1, 5))
        def interrupt(self, n: int) -> None:
            self.do("interrupt", n)

        @rule(n=st.integers(0, 100))
        def truncate(self, n: int) -> None:
            self.do("truncate", n)

        @rule()
        def reset(self) -> None:
            self.do("reset")

    return Cache


def judge(
    make: Callable[[DeepSeekConfig], Any] = LatentCache,
    label: str = "reference",
    level: str = "quick",
    number: int = 0,
    shrink: bool = True,
    expected: Expected | None = None,
    before: Before = lambda law, case: None,
) -> Verdict:
    """The verdict on one kind of cache; `before` is called with each case that is about to be played."""
    begun = time.perf_counter()
    told: list[tuple[list[Step], Mismatch]] = []
    for story in STORIES:
        before(LAW, json.dumps(story, separators=(",", ":")))
        if wrong := play(make, story):
            told = [(story, wrong)]
            break
    counted = [len(STORIES)]
    chosen = settings(
        max_examples=int(8 * LEVELS[level]),
        stateful_step_count=20,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
    )
    if not told:
        with suppress(_Found, FlakyFailure):
            run_state_machine_as_test(
                seed(number)(machine(make, told, counted, before)), settings=chosen, _min_steps=1
            )
    verdict = Verdict(NAME, label, LAW, not told, counted[0], time.perf_counter() - begun)
    if told:
        steps, wrong = told[-1]
        verdict.expected = (expected or Expected()).reason(NAME, LAW)
        verdict.why, verdict.where, verdict.got, verdict.want, verdict.bound, verdict.times = (
            wrong.what,
            list(wrong.where),
            *wrong[2:6],
        )
        verdict.case = json.dumps(steps, separators=(",", ":"))
        verdict.reproduce = reproduce(label, verdict.case)
    return verdict
