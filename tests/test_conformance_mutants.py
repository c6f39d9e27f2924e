"""The suite on trial: faults it must find, rewrites it must accept. One of each operation here, all in the
deep profile and by the command.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import pytest

from refimpl import conformance
from refimpl.cli import run
from refimpl.conformance import cache_machine
from refimpl.conformance.child import INTERPRETED
from refimpl.conformance.pool import Task, in_order, process
from refimpl.conformance.rows import MANY
from refimpl.conformance.selftest import campaign, equivalents, mutants
from refimpl.conformance.verdict import Verdict
from refimpl.errors import MismatchError, RefimplError
from refimpl.mutate import mutated
from refimpl.ops import OPS

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
ROOT = Path(__file__).parent.parent
DOCS, KERNELS, SUITE = ROOT / "docs", ROOT / "kernels", ROOT / "refimpl" / "conformance"
MUTANTS, REWRITES = mutants.everything(), [*equivalents.everything(), *equivalents.of_kernels()]


def some(things):
    """The first of each operation, unless all are wanted."""
    return things if DEEP else list({t.op: t for t in reversed(things)}.values())


@pytest.fixture(scope="module")
def pool():
    """A process with Triton's interpreter."""
    with process(MANY | INTERPRETED, 1) as found:
        yield found


@pytest.mark.parametrize("mutant", some(MUTANTS), ids=lambda m: f"{m.op}: {m.name}")
def test_a_fault_is_found_by_the_quick_level(mutant, pool):
    if level := mutant.lacks():
        pytest.skip(f"this CPU has no {level}")
    if mutant.interpreted:
        assert pool.submit(mutants.tried_by_name, mutant.op, mutant.name).result()[0] is not None
    else:
        assert mutants.tried(mutant) is not None


@pytest.mark.parametrize("flag", ["--mutants", "--equivalents"])
def test_a_name_that_names_nothing_is_no_green_campaign(flag, capsys):
    assert run(conformance.main, [flag, "--named", "xyzzy"]) == 2
    said = capsys.readouterr()
    assert "E8012 xyzzy" in said.err and "0 of 0" not in said.out


@pytest.mark.parametrize("rewrite", some(REWRITES), ids=lambda r: f"{r.op}: {r.name}")
def test_an_equivalent_rewrite_is_accepted(rewrite, pool):
    if getattr(rewrite, "interpreted", False):
        broken = pool.submit(equivalents.alarms_by_name, rewrite.op, rewrite.name).result()
    else:
        broken = equivalents.alarms(rewrite, level="quick" if DEEP else "smoke")
    assert not broken, broken


@pytest.mark.parametrize(
    "mutant",
    [m for m in mutants.source_mutants() if "numba" not in m.make.args[-1]],
    ids=lambda m: f"{m.op}: {m.name}",
)
def test_every_fault_can_be_planted(mutant):
    assert callable(mutant.make())


@pytest.mark.parametrize("file", ["kernel_faults.toml", "kernel_rewrites.toml"])
def test_every_text_to_change_stands_once_in_the_kernels(file):
    (entries,) = tomllib.loads((SUITE / file).read_text()).values()
    for entry in entries:
        modules = [*entry.get("over", ()), entry["where"].partition(":")[0]]
        paths = [ROOT / "refimpl" / f"{m.replace('.', '/')}.py" for m in modules]
        texts = [p.read_text() for p in (KERNELS.glob("*.p[yx][xi]") if entry.get("cython") else paths)]
        for old, new in entry["edits"]:
            assert sum(text.count(old) for text in texts) == 1 and old != new, (entry["name"], old)


def test_a_fault_whose_text_is_gone_is_an_error():
    with pytest.raises(RefimplError, match=r"E8009 refimpl\.formats\.q8_0"):
        mutated("refimpl.formats.q8_0", edits=[("no such line", "")], function="dequantize")


def test_planting_leaves_the_originals_as_they_were():
    from refimpl.formats import q4_k

    before = q4_k.dequantize, OPS["q4_k.dequantize"].reference
    mutants.source_mutants()[0].make()
    from refimpl.formats import q4_k as again

    assert (again.dequantize, OPS["q4_k.dequantize"].reference) == before


def test_a_copy_has_a_name_of_its_own_in_machine_code():
    """Numba makes symbols of module and function; a cached original that is loaded after a copy was compiled
    would be linked to the copy's.
    """
    changed = mutated(
        "refimpl.kernels.experts_numba", edits=[("out[:] = np.float32(0)", "pass")], function="_weighted_row"
    )
    original = OPS["experts"].fast["cpu"].partition(":")[0]
    assert (changed.py_func.__module__, changed.py_func.__qualname__) == (
        f"{original} changed",
        "_weighted_row",
    )
    assert changed.py_func.__module__ not in sys.modules


def test_faults_are_many_and_distinct_and_rewrites_as_many():
    assert len(mutants.kernel_mutants()) >= 60 and len(REWRITES) >= len(MUTANTS)
    assert len({(m.op, m.name) for m in MUTANTS}) == len(MUTANTS) and len(
        {(r.op, r.name) for r in REWRITES}
    ) == len(REWRITES)
    edits = [(m.make.args, str(m.make.keywords)) for m in mutants.source_mutants()]
    assert len(set(edits)) == len(edits)
    assert {m.op for m in MUTANTS} <= {*OPS, cache_machine.NAME}


def test_faults_dealt_out_to_processes_are_told_in_the_order_of_the_table():
    names = [m.name for m in MUTANTS if "scale and" in m.name]
    found = [(m.name, v and v.law) for m, v, _ in mutants.run(only="scale and", processes=2)]
    assert len(names) > 1 and found == [(name, "bits") for name in names]


@pytest.mark.parametrize("law, code", [("bits", 130), ("", 1)])
def test_a_campaign_that_is_stopped_keeps_what_it_found(law, code, capsys, monkeypatch, tmp_path):
    found = Verdict("", "", law, False, 1, 0.0) if law else None

    def stopped(*_):
        yield MUTANTS[0], found, 0.5
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(campaign, "run", stopped)
    page = tmp_path / "page.md"
    assert conformance.main(["--mutants", "--json", "--markdown", str(page)]) == code
    told = capsys.readouterr()
    (row,) = json.loads(told.out)
    count = f"{bool(law):d} of 1 faults found"
    assert row["law"] == law and f"stopped before the end: {count}" in told.err
    assert f"{count}. The command was stopped" in page.read_text()


def test_ctrl_c_ends_a_campaign_and_its_processes_with_one_line():
    command = [sys.executable, "-m", "refimpl.conformance", "--false-alarms", "1000", "--processes", "2"]
    started = subprocess.Popen(
        [*command, "--op", "q8_0.dequantize", "--backend", "reference"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in started.stderr:
        if "runs of the quick level" in line:  # so its processes have begun
            os.killpg(started.pid, signal.SIGINT)
            break
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130 and not err, err
    assert re.fullmatch(
        r"stopped before the end: \d+ of 1000 runs .* \d+ verdicts, 0 false alarms, .*\n", out
    )
    assert eventually(lambda: not alive(started.pid)), "one of its processes is left"


def eventually(true):
    """Whether it becomes true within some seconds: multiprocessing's own helper ends after its parent."""
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_pages_count_what_there_is():
    table = (DOCS / "mutants.md").read_text()
    listed = re.findall(r"^\| (\S+) \| (.+) \| (\w+) \|$", table, re.M)
    assert [(op, name) for op, name, _ in listed] == [(m.op, m.name) for m in MUTANTS]
    assert f"{len(MUTANTS)} of {len(MUTANTS)} faults found." in table
    page = " ".join((DOCS / "conformance.md").read_text().split())
    assert f"finds {len(MUTANTS)} of {len(MUTANTS)}" in page
    assert f"judges {len(REWRITES)} rewrites" in page and f"All {len(REWRITES)} are accepted" in page


def test_the_cache_is_judged_by_a_state_machine():
    assert cache_machine.judge(level="quick").passed


def test_an_edit_that_does_not_fit_is_said_in_one_line_though_another_process_finds_it():
    work = partial(mutated, edits=[("no such text", "")], function="index_rows")
    with pytest.raises(MismatchError, match=r"E8009 refimpl.reference.indexer: .*found 0"):
        list(in_order(1, 1, work, [Task(("refimpl.reference.indexer",), {})]))
