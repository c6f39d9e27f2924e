"""Figures for Prometheus at /metrics, in a registry of the server's own."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from refimpl.server.engine import Engine, Job, Turn


class Metrics:
    """What an operator watches: turns, tokens, refusals, who is active and who waits, memory of caches."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self.turns = Counter("refimpl_turns", "Turns that are over", registry=registry)
        self.prompt = Counter("refimpl_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter(
            "refimpl_cached_tokens", "Tokens of prompts found in a cache", registry=registry
        )
        self.made = Counter("refimpl_generated_tokens", "Tokens told to clients", registry=registry)
        self.refusals = Counter(
            "refimpl_refusals", "Requests refused, by status", ["status"], registry=registry
        )
        self.seconds = Histogram("refimpl_turn_seconds", "Seconds of a turn", registry=registry)
        gauges = {
            "active_turns": ("Turns being computed", lambda: len(engine.active)),
            "waiting_turns": ("Turns in line", lambda: len(engine.line)),
            "kept_caches": ("Caches kept for prompts that begin alike", lambda: len(engine.kept)),
            "cache_bytes": ("Bytes of all latent caches", engine.cache_bytes),
        }
        for name, (about, read) in gauges.items():
            Gauge(f"refimpl_{name}", about, registry=registry).set_function(read)

    def turn(self, turn: Turn, tokens: int, job: Job) -> None:
        """Count a turn that is over."""
        self.turns.inc()
        self.prompt.inc(len(turn.prompt))
        self.cached.inc(job.cached)
        self.made.inc(tokens)
        self.seconds.observe(time.monotonic() - job.started)

    def text(self) -> bytes:
        """All figures in Prometheus' own format."""
        return generate_latest(self.registry)
