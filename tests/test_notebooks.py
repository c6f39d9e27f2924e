"""The notebooks are built as promised (here, fast) and run (marked `notebooks`: `make notebooks`, with every
exercise untouched, then solved, then with every mistake that a checker names).

An exercise is a code cell tagged `exercise`, a code cell tagged `check`, and a markdown cell tagged
`solution` that folds it away in `<details>`. A cell tagged `live` prints what differs from run to run, such
as times, and is stored without outputs.
"""

import base64
import copy
import io
import os
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from refimpl import exercises as checkers

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 60
UNDONE, DONE = "Not yet:", "Right"
WRONG_ANSWERS = """
import types
from refimpl import exercises as real


def told(one, known, *rest):
    refused = [not one(wrong, *rest) for wrong in known]
    print("refused", sum(refused), "of", len(refused))


exercises = types.SimpleNamespace(
    check=lambda mine, right, inputs, mistakes=None, tolerance=0.0: told(
        real.check, (mistakes or {}).values(), right, list(inputs), None, tolerance
    ),
    answer=lambda mine, right, mistakes=None, tolerance=0.0: told(
        real.answer, mistakes or {}, right, None, tolerance
    ),
    judged=lambda *given: told(real.judged, ()),
)
"""
"""Checkers that hand the mistakes they know to the real ones, in place of the solution."""
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```.*?</details>", re.S)
nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(book):
    return [c for c in book.cells if c.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def text_of(cell):
    return "".join(
        o.get("text", "") for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"
    )


def exercises(book):
    """(stub, checker, source of the solution) of each."""
    found = []
    for i, cell in enumerate(book.cells):
        if "exercise" in tags(cell):
            checker, solution = book.cells[i + 1 : i + 3]
            assert "check" in tags(checker), f"cell {i} is not followed by its checker"
            folded = SOLUTION.search(solution.source)
            assert solution.cell_type == "markdown" and "solution" in tags(solution) and folded, (
                f"the solution of cell {i} is not folded away"
            )
            found.append((cell, checker, folded[1]))
    return found


# --- how they are built -------------------------------------------------------------------------------------


@every
def test_it_begins_with_a_question_and_ends_with_takeaways(path):
    book = read(path)
    nbformat.validate(book)
    first, last = book.cells[0], book.cells[-1]
    assert first.cell_type == last.cell_type == "markdown"
    assert re.match(rf"# {int(path.name[:2])}\. ", first.source) and "?" in first.source
    assert (
        last.source.startswith("## Takeaways")
        and last.source.count("\n- ") >= 3
        and "refimpl/" in last.source
    )


@every
def test_two_exercises_answer_the_untouched_stub(path):
    found = exercises(read(path))
    assert len(found) >= 2
    for _, checker, _ in found:
        assert text_of(checker).startswith(UNDONE) and "Traceback" not in text_of(checker)


@every
def test_it_says_how_to_set_up_and_its_last_exercises_are_harder(path):
    cells = read(path).cells
    assert "](../docs/notebooks.md#set-up)" in cells[0].source
    heads = [i for i, c in enumerate(cells) if c.source.startswith("## Exercises, harder\n")]
    assert len(heads) == 1 and sum("exercise" in tags(c) for c in cells[heads[0] :]) >= 2


@every
def test_it_reads_like_a_text_with_short_cells(path):
    book = read(path)
    prose = sum(
        len(re.sub(r"```.*?```", "", c.source, flags=re.S).split())
        for c in book.cells
        if c.cell_type == "markdown"
    )
    code = sum(len(c.source.split()) for c in code_cells(book))
    assert 1.5 <= prose / code <= 3.5, f"{prose} words of prose to {code} of code"
    assert statistics.median(len(c.source.splitlines()) for c in code_cells(book)) <= 9
    assert max(len(c.source.splitlines()) for c in code_cells(book)) <= 16


@every
def test_every_claim_ends_in_an_assertion(path):
    book = read(path)
    sections = re.split(
        r"^## ",
        "\n".join(c.source if c.cell_type == "markdown" else f"\0{c.source}" for c in book.cells),
        flags=re.M,
    )
    for section in sections[1:]:
        if "\0" in section:
            assert re.search(r"assert|exercises\.(check|answer|judged)\(", section), section.splitlines()[0]


@every
def test_stored_outputs_are_there_in_order_small_and_without_paths(path):
    book = read(path)
    assert [c.execution_count for c in code_cells(book)] == list(range(1, len(code_cells(book)) + 1))
    assert path.stat().st_size < 300_000
    outputs = [o for c in code_cells(book) for o in c.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    for cell in code_cells(book):
        assert not ("live" in tags(cell) and cell.outputs), cell.source
        assert cell.outputs or "print(" not in cell.source or "live" in tags(cell), cell.source
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"(^|[\s'\"(=])(/(?!/)[\w.-]+/|[A-Z]:\\)", shown), shown


@every
def test_pictures_are_readable_on_white_and_on_black(path):
    image = pytest.importorskip("PIL.Image", reason="pillow comes with matplotlib")
    for cell in code_cells(read(path)):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                pixels = np.asarray(image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))))
                assert pixels.shape[-1] == 4 and pixels.shape[1] <= 1000
                assert (pixels[..., 3] == 0).mean() > 0.02, "the picture paints its own background"
                assert len(output.data["text/plain"]) > 10 and "<" not in output.data["text/plain"], (
                    "the picture has no words"
                )


def test_the_index_page_names_every_notebook():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert re.findall(r"notebooks/(\d\d_\w+\.ipynb)", page) == [p.name for p in NOTEBOOKS]


# --- the checkers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "says"),
    [
        (lambda x: None, "gives nothing"),
        (lambda x: ..., "three dots"),
        (lambda x: 1 / 0, "raised ZeroDivisionError"),
        (lambda x: x[:2], "gives shape (2,), and (3,) is right"),
        (lambda x: 2 * x + np.array([0, 0, 1]), "gives 13 at [2], and 12 is right"),
        (lambda x: 2 * x + np.array([0, 0, 1e-9]), "gives 12.000000001 at [2], and 12 is right"),
        (lambda x: "two", "gives 'two'"),
        (lambda x: x * x, "It looks as if you squared it."),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(mine, says, capsys):
    inputs = [np.array([1, 2, 6]), np.array([3, 4, 5])]
    assert not checkers.check(mine, lambda x: 2 * x, inputs, {"you squared it": lambda x: x * x})
    printed = capsys.readouterr().out
    assert printed.startswith(UNDONE) and says in printed


def test_a_wrong_value_is_told_why(capsys):
    assert not checkers.answer(288, 144, {288: "each nibble was counted as a byte"})
    assert not checkers.answer(..., 144)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(UNDONE) and "nibble" in printed[0] and printed[1].startswith(UNDONE)


def test_a_right_answer_is_accepted(capsys):
    assert checkers.check(lambda x: x + x, lambda x: 2 * x, [np.array([1.0, np.nan]), 3])
    assert checkers.answer((1, "two"), (1, "two")) and checkers.answer(1.01, 1.0, tolerance=0.02)
    assert all(line.startswith(DONE) for line in capsys.readouterr().out.splitlines())


# --- running them -------------------------------------------------------------------------------------------


@pytest.mark.notebooks
@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages are not ours to mend
@every
def test_it_runs_from_a_clean_kernel_and_its_solutions_pass(path):
    from nbclient import NotebookClient

    stored = read(path)
    book = copy.deepcopy(stored)
    found = exercises(stored)
    solved = [nbformat.v4.new_code_cell(checker.source) for _, checker, _ in found]
    for (_, _, solution), again in zip(found, solved):
        book.cells += [nbformat.v4.new_code_cell(solution), again]
    mistaken = [nbformat.v4.new_code_cell(checker.source) for _, checker, _ in found]
    book.cells += [nbformat.v4.new_code_cell(WRONG_ANSWERS), *mistaken]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    client = NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=environment)
    for cell in solved:
        assert text_of(cell).startswith(DONE), text_of(cell)
    for cell in mistaken:
        assert re.search(r"^refused (\d+) of \1$", text_of(cell), re.M), f"accepted:\n{text_of(cell)}"
    for old, new in zip(code_cells(stored), code_cells(book)):
        if "live" not in tags(old):
            assert text_of(new) == text_of(old), f"stored output is stale:\n{old.source}"
