"""The judge of the field: who is judged is there, a missing package is one line, the pages say what is so."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from refimpl.conformance.field import bugs, history, page
from refimpl.conformance.field.__main__ import chosen, judged, main
from refimpl.conformance.field.contenders import CONTENDERS, Contender
from refimpl.conformance.importing import find
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.trial import Trial
from refimpl.ops import OPS

DOCS = Path(__file__).parent.parent / "docs"
SOME = (
    "gguf: decoders, q4_1*",
    "ml_dtypes: cast to E4M3*",
    "torch: _scaled_mm*",
    "transformers: DeepSeek-V3's router*",
)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_who_is_judged_exists_and_declares_what_there_is(contender):
    assert callable(find(contender.target())) and contender.op in OPS
    Manifest().with_values(contender.declared, contender.name)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_who_is_judged_takes_what_the_laws_hand_to_it(contender):
    """The arguments of every edge; nothing is called, so the package need not be there."""
    manifest = Manifest().with_values(contender.declared, contender.name)
    bind = inspect.signature(find(contender.target())).bind
    trial = Trial(contender.op, bind, manifest)
    for recipe in trial.family.edges(contender.op, manifest):
        trial.raw(*trial.build(recipe))


def test_at_least_twelve_paths_of_packages_are_judged():
    assert len({(c.package, c.what) for c in CONTENDERS}) >= 12
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("pattern", SOME)
def test_kernels_of_packages_that_are_installed_here_obey_the_laws(pattern):
    for contender in chosen([pattern]):
        if contender.missing():
            pytest.skip(contender.missing())
        found = judged(contender, "smoke")
        assert found.verdicts and not found.broken, page.line(found)


def test_a_package_that_is_missing_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--only", "gguf: decoders, q4_k*"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "not here: gguf not installed" in line


def test_the_command_of_a_kernel_names_what_it_declares():
    contender = Contender("p", "w", "linear", "m:f", {"modes": ["fp8"], "rows": 8, "shows_nan": False})
    told = "--kernel refimpl.conformance.field.m:f --declare modes=fp8 rows=8 shows_nan=false"
    assert page.command(contender).endswith(told)


# --- bugs of released kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", bugs.BUGS[::4], ids=lambda b: b.says)
def test_a_bug_of_a_released_kernel_is_found(bug):
    assert history.tried(bug).law


def test_the_page_of_bugs_lists_them_all():
    rows = re.findall(r"^\| (\S+#\d+|\S+) \| ([^|]+) \| `", (DOCS / "history.md").read_text(), re.M)
    assert [says for _, says in rows] == [b.says for b in bugs.BUGS]
    assert f"{len(rows)} of {len(rows)} are found" in (DOCS / "history.md").read_text()


def test_the_page_of_the_field_lists_them_all():
    text = (DOCS / "field.md").read_text()
    missing = [
        c.name
        for c in CONTENDERS
        if f"| {c.package} | {c.what} | `{c.op}` |" not in text and c.what not in text
    ]
    assert not missing
