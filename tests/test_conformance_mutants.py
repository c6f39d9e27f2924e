"""The suite on trial: faults it must find, rewrites it must accept. One of each operation here, all in the
deep profile and by the command.
"""

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from refimpl import conformance
from refimpl.cli import run
from refimpl.conformance import cache_machine
from refimpl.conformance.selftest import equivalents, mutants
from refimpl.conformance.selftest.mutant import interpreter
from refimpl.errors import RefimplError
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
    with interpreter() as found:
        yield found


@pytest.mark.parametrize("mutant", some(MUTANTS), ids=lambda m: f"{m.op}: {m.name}")
def test_a_fault_is_found_by_the_quick_level(mutant, pool):
    if mutant.interpreted:
        assert pool.submit(mutants.tried_by_name, mutant.op, mutant.name).result() is not None
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
        paths = [ROOT / f"{m.replace('.', '/')}.py" for m in modules]
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
