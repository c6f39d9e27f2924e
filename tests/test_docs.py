"""The pages say what the code does."""

import re
from pathlib import Path

import pytest

from refimpl import formats
from refimpl.formats import draw

ROOT = Path(__file__).parent.parent


def test_every_error_code_is_documented_and_every_documented_one_exists():
    source = "".join(p.read_text() for folder in ("refimpl", "kernels") for p in (ROOT / folder).rglob("*.py"))
    page = (ROOT / "docs" / "errors.md").read_text()
    assert set(re.findall(r'"(E\d{4})\b', source)) == set(re.findall(r"^\| (E\d{4}) \|", page, re.M))


def test_the_readme_s_tree_names_real_files():
    tree = (ROOT / "README.md").read_text().split("```")[1]
    for line in tree.splitlines():
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            assert any((ROOT / at / (name + end)).exists() for at in ("", "refimpl") for end in ("", ".py")), name


@pytest.mark.parametrize("module", [m for m in formats.FORMATS.values() if hasattr(m, "PARTS")], ids=lambda m: m.NAME)
def test_every_block_is_drawn_as_it_is(module):
    page = (ROOT / "docs" / "formats.md").read_text()
    bits = 8 * module.BLOCK.itemsize / module.WEIGHTS
    ruler = "".join(f"    {line.rstrip()}\n" for line in draw.ruler(module))
    assert f"**{module.NAME}**, {module.WEIGHTS} weights, {bits:g} bits a weight" in page and ruler in page
