"""Every one of the 108 bad inputs has a test with its number.

A number stands in a test's name (`test_g44_...`) or begins the name of a case ("G18 array of 2^63"), with the letter of its group, so that
`pytest -k G18` runs it. Of the merge's faults some are tested where the merge is; ELSEWHERE says where.
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
}
ELSEWHERE = {
    97: "test_convert_model.py test_outputs_in_use_and_full_disks_are_refused",  # no room, known before
    98: "test_convert_model.py test_an_interrupted_merge_leaves_no_output_and_goes_on_to_the_same_bytes",
    99: "test_convert_model.py test_outputs_in_use_and_full_disks_are_refused",
    101: "test_convert_model.py test_an_input_that_changes_meanwhile_is_an_error",
    102: "test_convert_model.py test_an_input_that_shrinks_meanwhile_is_an_error",
    107: "test_template.py test_templates_that_fail_attack_or_explode_give_one_line",  # the bombs
}


def numbered(source: str) -> set[tuple[str, int]]:
    """(letter, number) of every test and every case in a test file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_([a-z])(\d+)_", node.name)):
            found.add((match[1].upper(), int(match[2])))
        if isinstance(node, ast.Dict):
            texts = [ast.unparse(k).strip("f'\"") for k in node.keys if k is not None]
            found |= {(m[1], int(m[2])) for t in texts if (m := re.match(r"([A-Z])(\d+) ", t))}
        if isinstance(node, ast.DictComp) and (match := re.match(r"f'([A-Z])(\d+) ", ast.unparse(node.key))):
            found.add((match[1], int(match[2])))
    return found


def test_all_108_numbers_have_a_test():
    here = set().union(*(numbered(p.read_text()) for p in TESTS.glob("test_hostile*.py")))
    wrong = {(letter, n) for letter, n in here if n not in GROUPS.get(letter, ())}
    assert not wrong, f"numbers of another group: {sorted(wrong)}"
    for where in ELSEWHERE.values():
        file, test = where.split()
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), where
    assert {n for _, n in here} | ELSEWHERE.keys() == set(range(1, 109))


def test_the_search_for_numbers_finds_them():
    assert numbered("def test_g44_x(): pass\nA = {'S58 a': 1, 'no number': 2}\nB = {f'G37 {n}': n for n in x}") == {("G", 44), ("S", 58), ("G", 37)}
