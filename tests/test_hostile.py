"""Every one of the 127 bad inputs has a test with its number.

A number stands in a test's name (`test_g44_...`) or begins the name of a case ("G18 array of 2^63"), with the
letter of its group, so that `pytest -k G18` runs it. Of the merge's faults some are tested where the merge
is; ELSEWHERE says where.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
GROUPS = {
    "G": range(1, 47),  # GGUF files
    "P": range(47, 57),  # split GGUFs
    "S": range(57, 74),  # safetensors and their index
    "M": range(74, 89),  # inputs that do not belong together
    "V": range(89, 97),  # values
    "X": range(97, 106),  # the machine
    "C": range(106, 109),  # tokenizer, template, chat
    "O": range(109, 128),  # what comes from outside: places, other users, signals, and numbers beyond all use
}
ELSEWHERE = {
    97: ["test_convert_model.py test_outputs_in_use_and_full_disks_are_refused"],  # no room, known before
    98: ["test_convert_model.py test_an_interrupted_merge_leaves_no_output_and_goes_on_to_the_same_bytes"],
    99: [
        "test_convert_model.py test_outputs_in_use_and_full_disks_are_refused",
        "test_crash.py test_merges_to_two_outputs_do_not_meet",
    ],
    101: ["test_convert_model.py test_an_input_that_changes_meanwhile_is_an_error"],
    102: ["test_convert_model.py test_an_input_that_shrinks_meanwhile_is_an_error"],
    107: ["test_template.py test_templates_that_fail_attack_or_explode_give_one_line"],  # the bombs
}
PAGE = TESTS.parent / "docs" / "bad-input.md"


def numbered(source: str) -> dict[tuple[str, int], set[str]]:
    """{(letter, number): codes} of every test and every case in a test file."""
    found: dict[tuple[str, int], set[str]] = {}

    def add(name: str, pattern: str, node: ast.AST) -> None:
        if match := re.match(pattern, name):
            found.setdefault((match[1].upper(), int(match[2])), set()).update(
                re.findall(r"\bE\d{4}\b", ast.unparse(node))
            )

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            add(node.name, r"test_([a-z])(\d+)_", node)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                add(ast.unparse(key).strip("f'\"") if key else "", r"([A-Z])(\d+) ", value)
        if isinstance(node, ast.DictComp):
            add(ast.unparse(node.key), r"f'([A-Z])(\d+) ", node.value)
    return found


def here() -> dict[tuple[str, int], set[str]]:
    """The same of all tests."""
    found: dict[tuple[str, int], set[str]] = {}
    for path in TESTS.glob("test_hostile*.py"):
        for key, codes in numbered(path.read_text()).items():
            found.setdefault(key, set()).update(codes)
    return found


def test_all_numbers_have_a_test():
    wrong = {(letter, n) for letter, n in here() if n not in GROUPS.get(letter, ())}
    assert not wrong, f"numbers of another group: {sorted(wrong)}"
    for where in (w for places in ELSEWHERE.values() for w in places):
        file, test = where.split()
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), where
    assert {n for _, n in here()} | ELSEWHERE.keys() == set(range(1, 128))


def test_the_page_has_a_row_for_each_with_the_codes_that_its_tests_demand():
    rows = {
        (m[1], int(m[2])): set(re.findall(r"E\d{4}", m[3]))
        for m in re.finditer(r"^\| `([A-Z])(\d+)` \|(.*)$", PAGE.read_text(), re.M)
    }
    assert sorted(n for _, n in rows) == list(range(1, 128)) and all(
        n in GROUPS[letter] for letter, n in rows
    )
    demanded = here()
    everywhere = "".join(p.read_text() for p in TESTS.glob("*.py"))
    for key, codes in rows.items():
        assert demanded.get(key, set()) <= codes, f"{key}: the page lacks {demanded[key] - codes}"
        assert all(code in everywhere for code in codes), key


def test_the_search_for_numbers_finds_them():
    source = (
        "def test_g44_x(): f('E1005')\nA = {'S58 a': ('E2002', 1), 'no number': 2}\nB = {f'G37 {n}': "
        "n for n in x}"
    )
    assert numbered(source) == {("G", 44): {"E1005"}, ("S", 58): {"E2002"}, ("G", 37): set()}
