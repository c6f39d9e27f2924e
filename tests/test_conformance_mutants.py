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
from refimpl.conformance.child import INTERPRETED, Job
from refimpl.conformance.importing import find
from refimpl.conformance.lookup import Spec
from refimpl.conformance.pool import Task, in_order, process
from refimpl.conformance.rows import MANY
from refimpl.conformance.selftest import campaign, equivalents, mutants
from refimpl.conformance.selftest import mutant as mutant_module
from refimpl.conformance.truth.compare import Mismatch
from refimpl.conformance.verdict import Verdict
from refimpl.conformance.ways import NEEDS, Need
from refimpl.errors import InputFormatError, MismatchError, RefimplError
from refimpl.mutate import mutated
from refimpl.ops import OPS

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
ROOT = Path(__file__).parent.parent
DOCS, KERNELS, SUITE = ROOT / "docs", ROOT / "kernels", ROOT / "refimpl" / "conformance"
MUTANTS, REWRITES = mutants.everything(), [*equivalents.everything(), *equivalents.of_kernels()]
ON_GPU, REWRITES_ON_GPU = mutants.on_gpu(), equivalents.on_gpu()
LISTS = [f"{where}_{what}.toml" for where in ("kernel", "gpu") for what in ("faults", "rewrites")]


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
    if need := mutant.lacks():
        pytest.skip(f"needs {need}")
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


def named(listed, text):
    return [m.name for m in listed if text in m.name]


@pytest.mark.parametrize("name", ["second launch", "on a GPU"])
def test_what_needs_a_gpu_is_named_and_no_green_campaign_without_one(name, capsys, monkeypatch):
    monkeypatch.setattr(mutant_module, "NEEDS", dict.fromkeys(NEEDS, Need("a better machine", lambda: False)))
    for flag, listed in (("--mutants", ON_GPU), ("--equivalents", REWRITES_ON_GPU)):
        names = named(listed, name)
        assert run(conformance.main, [flag, "--named", name]) == (1 if names else 2)
        said = capsys.readouterr()
        told = f"not tried, as they need a better machine: {len(names)}"
        assert (told in said.out and "0 of 0" in said.out) if names else "E8012" in said.err
        assert all(n in said.out for n in names) if len(names) < campaign.FEW else names[0] not in said.out


def test_a_kernel_for_a_gpu_is_planted_in_a_process_of_its_own():
    for kind, found in (("fault", ON_GPU), ("rewrite", REWRITES_ON_GPU)):
        for i, mutant in enumerate(found):
            assert mutant.gpu and mutant.planted == f"refimpl.conformance.selftest.planted:{kind}_{i}"
    with pytest.raises(InputFormatError, match="E8006"):
        find("refimpl.conformance.selftest.planted:fault_1000")


def test_a_law_shows_a_fault_on_a_gpu_only_where_the_unchanged_kernel_keeps_it(monkeypatch):
    """An exception, or the end of a process, may have other reasons there. Rows for a GPU run on tensors of
    the CPU here.
    """
    fault = mutants.Mutant("", "rms_norm", int, gpu="gpu", planted="tests.broken_kernels:of_tensors")
    broken = mutants.tried(fault)
    assert broken.law == "bound" and not broken.why.startswith("raised ")
    monkeypatch.setattr(mutant_module.Child, "again", lambda *given: Mismatch("it fails as well"))
    assert not fault.shown_by(broken)
    for law, why in (("bound", "raised OutOfMemoryError: none left"), ("returns", "no end after 60 s")):
        verdict = Verdict("", "", law, False, 1, 0.0, why=why)
        assert not fault.shown_by(verdict) and fault._replace(gpu="").shown_by(verdict)
    assert fault._replace(hangs=True).shown_by(verdict)


def test_a_job_that_stops_at_the_first_broken_law_says_so_to_the_process():
    job = Job(Spec("q8_0.dequantize", "reference"), stop=True)
    assert Job.read(job.line()) == job


@pytest.mark.parametrize("file", LISTS)
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
    assert len(ON_GPU) >= 30 and len(REWRITES_ON_GPU) >= len(ON_GPU)
    assert len({m.name for m in (*MUTANTS, *ON_GPU)}) == len({m.name for m in MUTANTS}) + len(ON_GPU)
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

    monkeypatch.setattr(mutants, "run", stopped)
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


@pytest.mark.parametrize(("file", "planted"), [("mutants.md", MUTANTS), ("gpu-mutants.md", ON_GPU)])
def test_the_tables_list_what_there_is(file, planted):
    table = (DOCS / file).read_text()
    listed = re.findall(r"^\| (\S+) \| (.+) \| (\w+) \|$", table, re.M)
    assert [(op, name) for op, name, _ in listed] == [(m.op, m.name) for m in planted]
    assert f"{len(planted)} of {len(planted)} faults found." in table


def test_the_pages_count_what_there_is():
    page = " ".join((DOCS / "conformance.md").read_text().split())
    assert f"finds {len(MUTANTS)} of {len(MUTANTS)}" in page
    assert f"judges {len(REWRITES)} rewrites" in page and f"All {len(REWRITES)} are accepted" in page
    assert f"{len(ON_GPU)} faults need a GPU" in page and f"{len(REWRITES_ON_GPU)} rewrites" in page


def test_the_cache_is_judged_by_a_state_machine():
    assert cache_machine.judge(level="quick").passed


def test_an_edit_that_does_not_fit_is_said_in_one_line_though_another_process_finds_it():
    work = partial(mutated, edits=[("no such text", "")], function="index_rows")
    with pytest.raises(MismatchError, match=r"E8009 refimpl.reference.indexer: .*found 0"):
        list(in_order(1, 1, work, [Task(("refimpl.reference.indexer",), {})]))
