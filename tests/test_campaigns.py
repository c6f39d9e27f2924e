"""The short form of every campaign; `make campaigns` runs the long one."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.bench.resident import Memory
from refimpl.checkpoint import safetensors
from refimpl.errors import InputFormatError
from tests.campaigns import CAMPAIGNS, Part, Report, calls, campaign, commands, guard, make, scratch


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_the_short_form_finds_nothing(name):
    module = campaign(name)
    with scratch() as folder:
        report = module.run(module.SHORT, 0, Path(folder))
    assert not report.failures, "\n".join(report.failures[:10])
    assert report.cases >= module.SHORT


def _spin():
    while True:
        pass


def _refuse(what):
    raise InputFormatError("E1001", "a", what)


@given(st.sampled_from(sorted(calls.COMMANDS)), st.randoms(use_true_random=False))
def test_no_input_that_hypothesis_makes_ends_a_command_otherwise(files, name, rng):
    """It makes every choice of the campaign's, and shrinks what it finds."""
    with guard.watched(), commands.only_here():
        kind, why = commands.one(calls.COMMANDS[name], files, rng)
    assert kind != "failed", why


@pytest.fixture(scope="module")
def files():
    with scratch() as folder:
        yield calls.prepare(Path(folder))


def test_campaigns_go_on_with_the_next_seed_until_time_is_up():
    command = [
        sys.executable,
        "-m",
        "tests.campaigns",
        "prompts",
        "--count",
        "2",
        "--seconds",
        "0.2",
        "--json",
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["cases"] > 2 and not found["failures"]


def test_the_guard_tells_answers_from_failures():
    with guard.watched():
        assert guard.outcome(lambda: None) == ("accepted", "")
        assert guard.outcome(lambda: _refuse("b")) == ("refused", "E1001")
        assert guard.outcome(lambda: 1 // 0) == (
            "failed",
            "ZeroDivisionError: integer division or modulo by zero",
        )
        assert guard.outcome(_spin, 0.05)[0] == "failed"
        memory = Memory()
        memory.start()
        held = bytearray(b"x") * (128 << 20)  # more than what the heap may have free
        assert memory.before < 0 or memory.growth() > len(held) // 2


def test_one_name_twice_among_many_is_found_in_time(tmp_path):
    """Too large for the fuzzer to come upon: to count each name by itself takes a minute here."""
    names = [*range(40_000), 39_999]
    text = ",".join(f'"{n}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}' for n in names).join(
        "{}"
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(make.safetensors_bytes(text.encode(), bytes(40_000)))
    with guard.watched():
        assert guard.outcome(lambda: safetensors.read(path)) == ("refused", "E2004")


def test_several_processes_share_the_cases_of_one():
    """The same cases, each once, whoever has them; `prompts` has no limit on what a part makes at least."""
    found = []
    for processes in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "tests.campaigns",
            "prompts",
            "--cases",
            "21",
            "--seed",
            "3",
            "--json",
            "--processes",
            processes,
        ]
        found.append(
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            | {"seconds": 0}
        )
    assert found[0] == found[1] and found[0]["cases"] == 21


def test_a_part_that_dies_is_a_failure():
    parts = [
        Report(3, [], {"a": Counter(x=2, y=1)}, {"most": 1, "by": "z"}),
        Report(0, ["part 1/3 ended with exit code -11"], {}, {}),
    ]
    whole = Report.joined([*parts, Report(2, [], {"a": Counter(x=2), "b": Counter(x=1)}, {"most": 5})])
    assert whole == Report(
        5, parts[1].failures, {"a": Counter(x=4, y=1), "b": Counter(x=1)}, {"most": 5, "by": "z"}
    )
    assert [Part(i, 3).share(range(7)) for i in range(3)] == [range(0, 7, 3), range(1, 7, 3), range(2, 7, 3)]


def test_the_command_reports_and_refuses_unknown_names():
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "fuzz" in done.stderr
