"""Every command, called as its process calls it, with models, configs, metadata, manifests, rules and flags
that somebody made to break it: an answer, a line of usage or a refusal, never another exception; what it
prints is printable, and with `--json` it is JSON.

The models are small (two layers, two experts, 256 wide), so that a chat, a merge and a quantization take some
hundredths of a second. `cases` are shared among the commands by their cost.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from refimpl import warmup
from refimpl.bench import __main__ as bench
from refimpl.bench import format_error, random_model
from refimpl.bench.measure import Row
from refimpl.conformance import rows
from refimpl.conformance.selftest import equivalents, false_alarms, mutants
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import RefimplError, refusal, visible
from refimpl.loading import hub
from refimpl.model import Model
from tests.campaigns import WHOLE, Part, Report, guard, keep
from tests.campaigns.calls import COMMANDS, Command, Files, prepare, stdin

SHORT, LONG = 3000, 1_000_000
SECONDS = 10.0  # of CPU time for one call: a pattern of a stranger's tokenizer may take five


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """All commands; each has at least ten thousand cases in the long form."""
    files, failures, counts = prepare(folder), list[str](), dict[str, Counter[str]]()
    with guard.watched(), only_here():
        for name, command in COMMANDS.items():
            counts[name] = Counter()
            for i in part.share(range(max(1, round(cases * command.share)))):
                kind, why = one(command, files, random.Random(f"commands/{name}/{seed}/{i}"))
                counts[name][kind] += 1
                if kind == "failed":
                    failures.append(f"{name} case {i} of seed {seed}: {why}")
                    keep(folder, f"{name.split()[0]}-{seed}-{i}", why.encode("utf-8", "backslashreplace"))
    return Report(sum(map(Counter.total, counts.values())), failures, counts, {})


@contextmanager
def only_here() -> Iterator[None]:
    """Without the network, and without the hours that measuring, judging and compiling take."""
    row = Row("x", "cpu", "tiny", 1, float("nan"), float("inf"), 0.0, 1e308, -float("inf"), 0.0)
    instead: list[tuple[Any, str, Any]] = [
        (hub, "_download", _no_network),
        (warmup, "open_backend", lambda name, activations: CpuBackend("reference", activations)),
        (warmup, "Model", _Loaded),
        (bench, "_measured", lambda args: [row]),
        (format_error, "measure", lambda name, peer: {"format": name, "error": float("nan")}),
        (format_error, "table", str),
        (random_model, "write", _unwritten),
        (rows, "judged", lambda *given: []),
        (rows, "child", _unjudged),
        (mutants, "run", lambda *given: []),
        (equivalents, "run", lambda *given: []),
        (false_alarms, "campaign", lambda seeded, args: 0),
    ]
    with ExitStack() as stack:
        for module, name, value in instead:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


class _Loaded(Model):
    """A model that need not answer."""

    def forward(self, *given: Any, **flags: Any) -> np.ndarray:
        return np.zeros(1, np.float32)


def _no_network(name: str, wanted: Sequence[str]) -> Path:
    raise RefimplError("E5111", name, "no network in a campaign")


def _unwritten(raw: dict[str, Any], target: Path, progress: Any) -> None:
    raise refusal("E5101 random", target)


def _unjudged(*given: Any) -> Any:
    raise refusal("E8008", "campaign", found="", expected="")


def one(command: Command, files: Files, rng: random.Random) -> tuple[str, str]:
    shutil.rmtree(files.room, ignore_errors=True)
    files.room.mkdir()
    main, argv = command.call(rng, files)
    typed = io.TextIOWrapper(io.BytesIO(stdin(rng)), "utf-8", "surrogateescape")
    out, err, usage = io.StringIO(), io.StringIO(), []

    def call() -> None:
        try:
            with (
                chdir(files.room),
                redirect_stdout(out),
                redirect_stderr(err),
                mock.patch("sys.stdin", typed),
            ):
                main(argv)
        except SystemExit as end:
            usage.append(end.code)
        except (OSError, MemoryError) as error:  # one line of `cli.run`
            raise RefimplError("E5000", "machine", str(error)) from None

    kind, why = guard.outcome(call, SECONDS)
    if kind == "failed":
        return kind, f"{why} {argv!r:.600}"
    if usage:
        return ("usage", "") if usage == [2] else ("failed", f"exit {usage} {argv!r:.600}")
    if wrong := _printed(out.getvalue(), err.getvalue(), "--json" in argv, kind):
        return "failed", f"{wrong} {argv!r:.600}"
    return kind, why


def _printed(out: str, err: str, as_json: bool, kind: str) -> str:
    """What is wrong with what was printed; "" for nothing."""
    if visible(out) != out or visible(re.sub("\r|\x1b\\[K", "", err)) != re.sub("\r|\x1b\\[K", "", err):
        return f"not printable: {(out + err)!r:.200}"
    if as_json and kind == "accepted":
        try:
            for line in out.splitlines():  # one answer each
                json.loads(line, parse_constant=_no_constant)
        except ValueError as error:
            return f"not JSON ({error}): {out!r:.200}"
    return ""


def _no_constant(name: str) -> None:
    raise ValueError(name)
