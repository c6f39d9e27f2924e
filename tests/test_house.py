"""The kernels keep to the house's order: import-linter does not follow `refimpl/kernels`, a symlink without
`__init__`, so its contract is read for them here.
"""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels"
FILES = sorted(p for pattern in ("*.py", "*.pyx", "*.pxi") for p in KERNELS.glob(pattern))
BELOW = {"entered", "errors", "tensors", "files", "config", "formats", "reference"}


def imports(source: str) -> Iterator[str]:
    """Full names of what Python source imports, inside functions too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_lines(path: Path) -> str:
    """The source; of Cython, which `ast` does not read, the import lines."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return text
    return "\n".join(line for line in text.splitlines() if line.startswith(("import ", "from ")))


def rooms(source: str) -> set[str]:
    """Rooms of refimpl that source imports."""
    names = (name.split(".") for name in imports(source.replace(" cimport ", " import ")))
    return {name[1] for name in names if name[0] == "refimpl"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_kernels_import_only_what_lies_below_them(path):
    assert rooms(python_lines(path)) <= BELOW | {"kernels"}


def test_every_kernel_stands_in_the_table_of_its_folder():
    """Or a pattern does, such as `codec_*.pxi`."""
    named = re.findall(r"`([\w*]+\.(?:py|pyx|pxi))`", (KERNELS / "README.md").read_text("utf-8"))
    assert [p.name for p in FILES if not any(fnmatch(p.name, name) for name in named)] == []


def test_an_import_upward_would_be_seen():
    assert rooms("def f():\n    from refimpl import ops, formats\n    import refimpl.bench.cpu") == {
        "ops",
        "formats",
        "bench",
    }


# What one process of ours says to another, on a pipe.
PROTOCOLS = {"text/sandbox.py", "conformance/child.py", "devices/placement.py", "loading/compiling.py"}


def test_what_commands_print_as_json_is_made_in_one_place():
    """`cli.to_json`, which has no NaN and nothing that a terminal acts upon."""
    house = ROOT / "refimpl"
    found = {
        str(path.relative_to(house))
        for path in house.rglob("*.py")
        if "kernels" not in path.parts
        and re.search(r"(print|write)\(\s*json\.dumps?\(", path.read_text("utf-8"))
    }
    assert found <= PROTOCOLS, "to_json is for that"


def test_kernels_import_each_other_in_no_circle():
    """Leaves are taken away until nothing is left."""
    own = {p.stem for p in FILES if p.suffix == ".py"}
    above = {
        p.stem: {name.split(".")[2] for name in imports(p.read_text("utf-8")) if ".kernels." in name} & own
        for p in FILES
        if p.suffix == ".py"
    }
    assert above["linear_numba"] > {"dot_llvm"}
    while leaves := {name for name, needs in above.items() if not needs & above.keys()}:
        above = {name: needs for name, needs in above.items() if name not in leaves}
    assert not above, f"in a circle or above one: {above}"


PRODUCTS = {f"np.{name}" for name in ("dot", "matmul", "einsum", "inner", "tensordot", "vdot")}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*_numba.py")), ids=lambda p: p.name)
def test_no_product_of_a_token_is_left_to_blas(path):
    """Its threads look for more work for a tenth of a second, on the cores that the team's want."""
    tree = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    found = [ast.unparse(n) for n in tree if isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult)]
    found += [ast.unparse(n) for n in tree if isinstance(n, ast.Attribute) and ast.unparse(n) in PRODUCTS]
    assert found == []
