"""Every row of OPS under the laws of the conformance suite, and the suite itself: that it reads the table,
and that its verdicts can be trusted.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl
import refimpl.kernels
from refimpl import formats, ops
from refimpl.cli import run
from refimpl.conformance import Manifest, greedy_ties, main, report, suite
from refimpl.conformance.child import Child, Job, Patience
from refimpl.conformance.families import by_name
from refimpl.conformance.inputs import arrays, cached, draws, products
from refimpl.conformance.judge import again, judge
from refimpl.conformance.laws.ladder import LAWS, applying
from refimpl.conformance.lookup import Spec, row, table
from refimpl.conformance.manifest import Expected
from refimpl.conformance.rows import interpreted, of_one_process
from refimpl.conformance.trial import KernelRaised, Trial
from refimpl.conformance.truth import bounds, compare, e4m3_by_search, quantizers
from refimpl.conformance.ways import ELSEWHERE, INTERPRET, SIMD, elsewhere, environments
from refimpl.entered import entered
from refimpl.errors import RefimplError
from refimpl.formats import draw, e4m3, q4_1, q8_0, q8_k
from refimpl.model import Model
from refimpl.ops import OPS
from refimpl.reference import fp8, quantizing
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder
from tests.broken_kernels import swapped

LEVEL = "full" if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else "smoke"
BRIEF = "quick" if LEVEL == "full" else "smoke"
ROOT = Path(__file__).parent.parent
KERNELS = Path(next(iter(refimpl.kernels.__path__))).resolve()


HERE = [(op, backend) for op, backend in table() if not interpreted(backend)]
IN_TRITON = [op for op, backend in table() if interpreted(backend)]


@pytest.mark.parametrize(("op", "backend"), HERE)
def test_a_row_of_the_table_obeys_every_law(op, backend):
    verdicts = judge(row(op, backend, LEVEL))
    assert verdicts and all(v.passed for v in verdicts), report.text(v for v in verdicts if not v.passed)


@pytest.mark.parametrize("half", [0, 1])
def test_rows_in_triton_s_interpreter_obey_every_law(half):
    """In processes of two halves of them: each must load torch and Triton first."""
    ops_ = [word for op in IN_TRITON[half::2] for word in ("--op", op)]
    if not ops_:
        pytest.skip("there is a GPU: these rows are judged on it, one by one")
    verdicts = json.loads(command(*ops_, "--backend", "cuda", "--level", LEVEL, "--json", code=0))
    assert {v["operation"] for v in verdicts} == set(ops_[1::2])


# --- it reads the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_inputs_and_a_demand(op):
    laws = {law.name for law in applying(row(op, "reference"))}
    assert ("bits" in laws) == (OPS[op].equal == "bits") and ("bound" in laws) == (OPS[op].equal == "bound")
    assert {"edges", "layouts", "unmodified", "fresh", "repeat", "concurrent"} <= laws
    # A reference's products are those of BLAS, which may differ by the number of threads.
    assert ("threads" in laws) == (OPS[op].equal == "bits")


def test_an_operation_without_a_family_is_an_error():
    with pytest.raises(RefimplError, match=r"E8003 q4_k\.transpose"):
        by_name.family("q4_k.transpose")


@cache
def imports_of(file):
    """Modules of refimpl.kernels that a kernel imports, or names for importlib."""
    tree = [*ast.walk(ast.parse(file.read_text()))]
    froms = [
        n for n in tree if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("refimpl.kernels")
    ]
    named = {
        n.value.split(".")[2]
        for n in tree
        if isinstance(n, ast.Constant) and re.fullmatch(r"refimpl\.kernels\.\w+", str(n.value))
    }
    return named | {
        name
        for n in froms
        for name in ([a.name for a in n.names] if n.module == "refimpl.kernels" else [n.module.split(".")[2]])
    }


FILES = {f.stem: f for f in KERNELS.glob("*.py")}


def reached(names):
    """These files and all that they import."""
    known = set(names)
    while more := {i for name in known & FILES.keys() for i in imports_of(FILES[name])} - known:
        known |= more
    return known


def test_no_kernel_is_outside_the_table():
    """Each file is named by a row or the benchmark, or imported by one that is. A function called like a
    reference is a row's, or in a file that the row's imports.
    """
    targets = {target for op in OPS.values() for target in op.fast.values()}
    rows = {t.split(":")[0].rpartition(".")[2] for t in targets}
    contenders = {
        name for file in (KERNELS.parent / "refimpl" / "bench").glob("*.py") for name in imports_of(file)
    } - rows  # of the benchmark alone
    devices = {n for file in (KERNELS.parent / "refimpl" / "devices").glob("*.py") for n in imports_of(file)}
    assert FILES.keys() <= reached(rows | contenders | (devices & {"serve_numba"}))  # rows, asked otherwise
    references = {name for name in OPS if "." not in name}
    for name, file in ((n, f) for n, f in FILES.items() if n not in contenders):
        public = {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
        for function in public & references:
            inside = reached(
                target.split(":")[0].rpartition(".")[2] for target in OPS[function].fast.values()
            )
            assert f"refimpl.kernels.{name}:{function}" in targets or name in inside, (
                f"{name}:{function} is in no row of OPS"
            )


# --- what is true, and how far from it ----------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    how=st.sampled_from(["q8_k", "q8_0", "e4m3"]),
    power=st.integers(-8, 3),
    size=st.sampled_from([0.0, 1e-6, 1e-3]),
)
def test_whatever_is_quantized_from_within_the_error_lies_within_the_bound(seed, how, power, size):
    rng = np.random.default_rng(seed)
    h = np.ldexp(rng.normal(0, 1, (3, 256)), power)
    error = np.abs(h) * size
    middle, half = bounds.requantized(h, error, how)
    for toward in (-1, 0, 1, rng.uniform(-1, 1, h.shape)):
        other = bounds.rounded((h + error * toward).astype(np.float32), how)
        assert (np.abs(other - middle) <= half * 1.000001 + 2.0**-24 * np.abs(h)).all()


def test_the_bound_of_a_quantized_number_is_narrow_unless_a_tie_is_near():
    h = np.random.default_rng(0).normal(0, 1, (20, 256))
    _, half = bounds.requantized(h, np.abs(h) * 1e-5, "q8_k")
    step = np.abs(h).max(axis=-1, keepdims=True) / 127
    assert (half > step / 4).mean() < 0.01 and np.median(half / step) < 1e-3


@pytest.mark.parametrize("kind", draws.WEIGHTS)
def test_exact_weights_round_to_the_reference_s(kind):
    w = draws.weight(np.random.default_rng(1), kind, 3, 512)
    exact, size = bounds.dense(w)
    np.testing.assert_array_equal(exact.astype(np.float32), dense(w))
    assert (size >= np.abs(exact)).all()


def test_codes_found_by_comparing_are_those_of_the_reference():
    x = np.arange(0, 2**32, 65519, dtype=np.uint64).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(e4m3_by_search.e4m3_codes(x), e4m3.encode(x))


@pytest.mark.parametrize(
    ("x", "even", "away", "zero", "nan"),
    [(464, 0x7E, 0x7E, 0x7E, 0x7E), (17, 0x58, 0x59, 0x58, 0x58), (500, 0x7E, 0x7E, 0x7E, 0x7F)],
)
def test_policies_of_rounding_and_overflow(x, even, away, zero, nan):
    for rounding, want in (("nearest-even", even), ("nearest-away", away), ("toward-zero", zero)):
        assert e4m3_by_search.e4m3_codes(np.float32(x), rounding) == want
    assert e4m3_by_search.e4m3_codes(np.float32(x), overflow="nan") == nan


def test_comparisons_name_the_worst_element():
    a = np.array([[1, 2], [3, np.nan]], np.float32)
    assert (
        compare.same_bits(a, a.copy()) is None
        and compare.within(a, a.astype(np.float64), np.zeros(1)) is None
    )
    b = a.copy()
    b[1, 0] = 4
    found = compare.within(b, a.astype(np.float64), np.full((2, 2), 0.25))
    assert found.where == (1, 0) and found.times == 4 and found.got == "4.0 (0x40800000)"
    assert compare.same_bits(a.T, a).where == (0, 1)
    assert compare.within(np.float32([np.inf]), np.array([1e300]), np.array([np.inf])) is not None


def test_comparisons_look_at_shape_type_signs_and_kinds_of_nan():
    a, quiet, negative = np.float32([1, 2]), np.float32([np.nan]), np.uint32([0xFFC00000]).view(np.float32)
    assert (
        "shape" in compare.same_bits(a[:1], a).what and "int8" in compare.same_bits(np.int8([1, 2]), a).what
    )
    assert "other bits" in compare.same_bits(np.float32([-0.0]), np.float32([0.0])).what
    assert (
        compare.same_bits(negative, quiet, nan="any") is None
        and compare.same_bits(negative, quiet) is not None
    )
    assert compare.same_bits(np.uint8([0xFF]), np.uint8([0x7F]), nan="any", codes=True) is None


@pytest.mark.parametrize(
    "module", [m for m in ops.STORED if m.BLOCK.names and m is not q8_k], ids=lambda m: m.NAME
)
def test_the_products_of_a_format_are_all_there(module):
    part = dict(zip(module.PARTS, module.unpack(products.blocks(module).view(np.uint8))))
    bits = draw.widths(module)
    assert bits["q"] == int(re.search(r"\d", module.NAME)[0]), "as many as the format's name says"
    assert bits == {"q": bits["q"]} | SUBSCALES.get(module.NAME, bits)
    for name in bits.keys() - {"q"}:
        scales = np.broadcast_to(part[name][..., None], part["q"].shape)
        assert len(set(zip(scales.flat, part["q"].flat))) == 2 ** (bits["q"] + bits[name])
    assert len(np.unique(part["q"])) == 2 ** bits["q"]


SUBSCALES = {
    "Q2_K": {"sc": 4, "m": 4},
    "Q3_K": {"sc": 6},
    "Q4_K": {"sc": 6, "m": 6},
    "Q5_K": {"sc": 6, "m": 6},
    "Q6_K": {"sc": 8},
    "IQ4_XS": {"sc": 6},
    "MXFP4": {"e": 8},
    "NVFP4": {"d": 8},
}


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-8, 3), size=st.sampled_from([0.0, 1e-6, 1e-4]))
def test_a_fused_quantizer_may_be_off_by_its_bound_and_no_more(seed, power, size):
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.normal(0, 1, (3, 300)), power).astype(np.float32)
    h = bounds.Sum(x.astype(np.float64), np.abs(x) * size)
    for toward in (-1, 0, 1, rng.uniform(-1, 1, x.shape)):
        assert (
            quantizers.check_codes(fp8.act_quant((h.true + toward * h.bound).astype(np.float32)), h) is None
        )
    codes, scale = fp8.act_quant(x)
    assert "scale" in quantizers.check_codes((codes, scale * np.float32(1 + 3 * size + 1e-6)), h).what
    ratio = np.abs(x / np.repeat(scale, 128, axis=-1)[:, :300])
    near = e4m3.decode(codes & 0x7F)
    decided = np.argwhere((np.abs(ratio - near) < near / 64) & (near > 1) & (near < 448))
    at = tuple(decided[rng.integers(len(decided))])
    for code in (codes[at] + 1, codes[at] - 1, codes[at] ^ 0x80, 0x7F):
        other = codes.copy()
        other[at] = code
        assert quantizers.check_codes((other, scale), h).where == at


def test_a_normed_result_that_nobody_keeps_is_none():
    args = by_name.family("rms_norm_quant").build(
        "rms_norm_quant", {"tokens": 3, "width": 300, "x": "normal", "seed": 1}, Manifest()
    )
    kept, left = quantizing.rms_norm_quant(*args), quantizing.rms_norm_quant(*args, keep=False)
    assert left[0] is None and all(np.array_equal(a, b) for a, b in zip(kept[1:], left[1:]))


def test_greedy_tokens_that_rounding_can_change_are_told_from_those_it_cannot(hybrid_folder):
    """The embedded model is sure of its answer to a problem of its own kind; two rows of its head that are
    alike leave it ambiguous.
    """
    model = refimpl.load(hybrid_folder, backend="reference")
    ids, first_of_answer = Encoder.open(FP8_DIR).example("", problems("sum", "heldout", 1, seed=8))
    answer = np.arange(first_of_answer - 1, first_of_answer + 11)
    assert not greedy_ties.ambiguous_tokens(model, ids)[answer].any()
    first, other = model.logits(ids)[answer[3]].argsort()[[-1, -2]]
    head = dense(model.checkpoint["output.weight"]).copy()
    head[other] = head[first]
    twin = Model(model.config, {**model.checkpoint, "output.weight": head})
    assert greedy_ties.ambiguous_tokens(twin, ids)[answer[3]]


def test_layouts_are_what_they_are_called():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    made = {name: layout(x) for name, layout in arrays.LAYOUTS.items()}
    assert all(np.array_equal(y, x) for y in made.values())
    assert not made["at an odd address"].flags.aligned and made["at an odd address"].flags.writeable
    assert not made["read-only"].flags.writeable
    assert made["four bytes past sixteen"].ctypes.data % 16 == 4
    assert not any(
        made[name].flags.c_contiguous for name in ("every second", "backwards", "by columns", "padded rows")
    )
    far = arrays.far_apart(x)
    assert np.array_equal(far, x) and far.strides[0] > 2**31 and 2 * far.strides[0] // far.itemsize > 2**31


def test_the_ends_of_what_inputs_can_be_are_tried():
    """Each of these is right on random inputs of everyday size."""
    linear = OPS["linear"].reference

    def sixteen_bits(x, w, a="fp8"):
        y = linear(x, w, a)
        return np.where(np.abs(y) > 60_000, np.float32(np.inf), y)

    def hides(x, w, a="fp8"):
        return np.nan_to_num(linear(x, w, a)) if np.isfinite(x).all() else linear(x, w, a)

    def forgets_the_scales(x, w, a="fp8"):
        return linear(x if isinstance(x, np.ndarray) else e4m3.decode(x.codes), w, a)

    for kernel, kind in ((sixteen_bits, "q4_k"), (hides, "q6_k"), (forgets_the_scales, "fp8")):
        verdict = judge(Trial("linear", kernel, Manifest(weights=(kind,)), "a:b"), ["extremes"])[-1]
        assert not verdict.passed and verdict.law == "extremes", kernel
        assert judge(row("linear", "reference"), ["edges"])[-1].passed

    def gives_up(x):
        """On the whole row, where one block of it has no scale."""
        y, huge = q8_0.quantize(x), np.abs(x).max(axis=-1, keepdims=True) > 2.0**20
        return np.where(huge, np.uint8(0), y)

    def spoils(w):
        codes, scale = fp8.weight_quant(w)
        return ScaledFP8(codes if np.isfinite(w).all() else codes * np.uint8(0), scale)

    for op, kernel in (("q8_0.quantize", gives_up), ("fp8.weight_quant", spoils)):
        verdict = judge(Trial(op, kernel, label="a:b"), ["extremes"])[-1]
        assert verdict.law == "extremes" and "spoiled" in verdict.case, kernel

    def once_each(x, ids, *rest):
        ids = np.array([[e if e not in row[:i] else (e + 1) % 5 for i, e in enumerate(row)] for row in ids])
        return OPS["experts"].reference(x, ids.reshape(len(x), -1), *rest)

    assert not judge(Trial("experts", once_each, Manifest(weights=("q4_k",)), "a:b"), ["extremes"])[-1].passed


# --- verdicts -----------------------------------------------------------------------------------------------


NAME = "tests.broken_kernels:swapped"


def command(*args, code, **env):
    """What `python -m refimpl.conformance` prints, here; kernels are judged in a process of their own."""
    out, err = StringIO(), StringIO()
    with mock.patch.dict(os.environ, env), redirect_stdout(out), redirect_stderr(err):
        try:
            found = run(main, list(args))
        except SystemExit as error:  # argparse's
            found = error.code
    assert found == code, out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue()
    return out.getvalue()


def test_a_failure_says_what_where_how_much_and_how_to_see_it_again(tmp_path):
    page = tmp_path / "report.md"
    (verdict,) = json.loads(
        command(
            "--op",
            "q4_k.dequantize",
            "--kernel",
            NAME,
            "--law",
            "bits",
            "--json",
            "--markdown",
            str(page),
            code=1,
        )
    )
    assert not verdict["passed"] and verdict["where"] and re.match(r"\S+ \(0x[0-9a-f]{8}\)", verdict["got"])
    data = json.loads(verdict["case"])["data"]
    assert sum(b != 0 for b in bytes.fromhex(data)) <= 6 and len(data) == 288, "one block, almost all zeros"
    assert (
        NAME in page.read_text()
        and "**FAIL**" in page.read_text()
        and verdict["reproduce"] in page.read_text()
    )
    words = verdict["reproduce"].split(" ", 3)[3].replace("'", "").split(" ")
    assert "other bits" in command(*words, code=1)
    assert "pass" in command(*[w if w != NAME else "refimpl.formats.q4_k:dequantize" for w in words], code=0)


def test_rows_dealt_out_to_processes_get_the_same_verdicts_in_the_same_order():
    rows = ("--op", "e4m3.decode", "--op", "rope", "--backend", "reference", "--json")
    one, two = (json.loads(command(*rows, *more, code=0)) for more in ((), ("--processes", "2")))
    assert len(one) > 20 and [{**v, "seconds": 0} for v in two] == [{**v, "seconds": 0} for v in one]


def test_rows_of_an_operation_are_judged_in_one_process_and_those_of_an_environment_in_another():
    other = (("REFIMPL_SIMD", "generic"),)
    chosen = [
        Spec("linear", "reference"),
        Spec("rope", "reference"),
        Spec("linear", "cpu"),
        Spec("linear", "cpu", environment=other),
        Spec("swiglu", "cpu", environment=other),
    ]
    assert of_one_process(chosen, [1, 0, 2, 3, 4]) == [[1], [0, 2], [3, 4]]


def test_laws_that_draw_the_same_inputs_are_searched_once(monkeypatch):
    found = cached.Memo(2**17)
    monkeypatch.setattr("refimpl.conformance.judge.RECIPES", found)
    verdicts = {v.law: v for v in judge(row("rope", "reference"), ["far_rows", "threads", "repeat"])}
    drawn = {len(recipes) for recipes, _ in found.kept.values()}
    assert len(found.kept) == 2 and drawn == {LAWS["threads"].examples, LAWS["repeat"].examples}
    assert verdicts["far_rows"].passed and verdicts["repeat"].passed


def test_an_expected_failure_is_none_and_the_environment_names_a_kernel(tmp_path):
    known = tmp_path / "xfails"
    known.write_text("# known\nq4_k.* bits   # nibbles\n")
    out = command(
        "--op",
        "q4_k.dequantize",
        "--law",
        "bits",
        "--xfails",
        str(known),
        code=0,
        REFIMPL_CONFORMANCE_KERNEL=NAME,
    )
    assert "xfail" in out and "1 failed as expected" in out


def test_a_bad_bound_shows_by_how_much_it_was_missed():
    trial = Trial(
        "rms_norm", lambda x, w, eps: OPS["rms_norm"].reference(x, w, eps) * np.float32(1.001), label="a:b"
    )
    verdict = next(v for v in judge(trial, ["bound"]))
    assert not verdict.passed and verdict.times > 10 and verdict.bound > 0
    assert again(trial, "bound", verdict.case) is not None
    assert "missed" in report.failure(verdict)


def test_a_kernel_that_raises_fails():
    trial = Trial("rope", lambda x, cos, sin: 1 / 0, label="a:b")
    (verdict,) = judge(trial, ["bound"])
    assert verdict.law == "form" and "ZeroDivisionError" in verdict.why


test_the_reference_as_a_line_of_pytest = suite("q6_k.dequantize", OPS["q6_k.dequantize"].reference)
BROKEN = ("bits", "edges", "exhaustive", "layouts", "fresh", "threads", "real_sizes")
test_a_known_failure_as_a_line_of_pytest = suite(
    "q4_k.dequantize", swapped, xfail=dict.fromkeys(BROKEN, "nibbles")
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Manifest().with_declared(["overflow"]), "E8001 overflow: not a declaration"),
        (lambda: Manifest().with_declared(["overflow=wrap"]), "E8001 overflow=wrap"),
        (lambda: Manifest().with_declared(["speed=high"]), "E8001 --declare: speed is nothing to declare"),
        (lambda: Manifest().with_declared(["columns=many"]), "E8001 --declare: columns has the wrong type"),
        (lambda: suite("q4_k.decode", swapped), "E8007 q4_k.decode"),
        (lambda: suite("q4_k.dequantize", "no.such:thing"), "E8006 no.such:thing"),
        (lambda: suite("q4_k.dequantize", "thing"), "E8006 thing"),
        (lambda: row("rope", "tpu"), "E8008 rope"),
        (lambda: again(row("rope", "reference"), "beauty", "{}"), "E8005 beauty"),
        (lambda: again(row("rope", "reference"), "bound", "{"), "E8004 --case: not JSON"),
        (lambda: again(row("rope", "reference"), "bound", "[1]"), "E8004 --case: not a whole case"),
    ],
)
def test_what_is_asked_wrongly_is_answered_in_one_line(make, message):
    with pytest.raises(RefimplError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("given", ["my_kernels.py:decode", "my_kernel:decode", "my_kernels:decoed"])
def test_a_misspelled_kernel_is_answered_with_the_nearest(given, tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text("def decode(data): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RefimplError, match=r"E8006 .*did you mean (my_kernels:)?decode\?"):
        suite("q4_k.dequantize", given)


def test_a_kernel_that_raises_is_told_the_line_of_its_own_file():
    def raising(data):
        return np.zeros(0).reshape(7)

    line = raising.__code__.co_firstlineno + 1
    trial = Trial("q4_k.dequantize", raising)
    with pytest.raises(KernelRaised, match=rf"^ValueError in line {line} of test_conformance\.py: cannot"):
        trial.raw(np.zeros(144, np.uint8))


def test_files_of_manifests_and_expected_failures_are_read_strictly(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text('overflow = "nan"\ncolumns = 128\nmodes = ["fp8"]\n')
    assert Manifest.read(file) == Manifest(overflow="nan", columns=128, modes=("fp8",))
    file.write_text("overflow nan")
    with pytest.raises(RefimplError, match=r"E8001 .*not a TOML file"):
        Manifest.read(file)
    file.write_text("# a comment\nonly-one-word\n")
    with pytest.raises(RefimplError, match=r"E8002 .*m.toml:2"):
        Expected.read(file)


def test_what_is_installed_needs_no_checkout(tmp_path):
    pytest.importorskip("setuptools", reason="copies the package as an installation does")
    source, lib = tmp_path / "source", tmp_path / "lib"
    shutil.copytree(
        ROOT / "refimpl", source / "refimpl", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    env = os.environ | {"PYTHONPATH": str(lib)}
    code = (
        "import refimpl; from refimpl.conformance.selftest import mutants; print(refimpl.__file__, "
        "mutants.tried(mutants.everything()[0]).law)"
    )
    where, law = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    ).stdout.split()
    assert where.startswith(str(lib)) and law == "bits"
    judged = [sys.executable, "-m", "refimpl.conformance", "--op", "rope", "--backend", "cpu", "--json"]
    done = subprocess.run(judged, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) > 8, done.stderr


def test_the_command_lists_laws_and_refuses_half_a_question():
    assert "one_hot" in command("--laws", code=0)
    command("--kernel", NAME, code=2)
    command("--op", "rope", "--case", "{}", code=2)


# --- every way runs -----------------------------------------------------------------------------------------


def forked(x, weight, eps):
    """RMSNorm that says which of two ways it takes; it never sees a row of ten thousand."""
    entered("wide" if x.shape[-1] > 10_000 else "narrow")
    return OPS["rms_norm"].reference(x, weight, eps)


@pytest.mark.parametrize(
    ("ways", "why"),
    [
        (("narrow",), ""),
        (("narrow", "wide"), "never entered: wide"),
        (("wide",), "never entered: wide"),
        (("narrow", "small"), "never entered: small"),
    ],
)
def test_a_way_that_no_case_takes_is_a_failure(ways, why):
    trial = Trial("rms_norm", forked, label="a:b", ways=dict.fromkeys(ways, ""))
    (verdict,) = judge(trial, ["ways"])
    assert verdict.law == "ways" and verdict.passed == (not why) and verdict.why == why


def test_a_way_that_nobody_declared_is_a_failure_and_one_of_another_machine_is_named():
    verdict = judge(Trial("rms_norm", forked, label="a:b", ways={"a team": "hopper"}), ["ways"])[-1]
    assert verdict.why == "entered, and declared by nobody: narrow"
    assert verdict.note == "a team (needs a GPU of compute capability 9)"


def test_other_environments_are_tried_with_teams_and_at_the_ends_of_numbers():
    """Rows that are dealt out have one thread, but where the law of threads asks for more. Without Triton all
    laws are tried.
    """
    assert {"threads", "extremes", "dyadic", "ways"} <= set(ELSEWHERE)
    assert elsewhere(((SIMD, "avx2"),)) == ELSEWHERE
    assert elsewhere(((INTERPRET, ""),)) is None
    trial = row("linear", "cpu")
    shapes = {(r["tokens"], r["rows"]) for r in LAWS["threads"].cases(trial) if "real" in r}
    assert (127, 2051) in shapes and (7, 2051) in shapes


def test_a_cache_in_bfloat16_has_latents_and_keys_side_by_side():
    pytest.importorskip("torch")
    taken = Manifest(array="torch", weights=("plain", "bf16"))
    trial = Trial("mla_absorbed", OPS["mla_absorbed"].reference, taken)
    recipe = next(r for r in trial.family.edges(trial.op, trial.manifest) if r.get("bf16"))
    for _ in range(2):  # made, and made again
        _, _, latent, k_pe, *_ = arrays.to_kernel(trial.build(recipe), trial.manifest)
        assert latent.stride() == k_pe.stride() == (latent.shape[1] + k_pe.shape[1], 1)
        assert k_pe.data_ptr() == latent.data_ptr() + latent.shape[1] * latent.element_size()


def test_stacks_that_are_lists_of_arrays_have_no_offsets_beyond_31_bits():
    """They are no array of their own, so that the law has nothing to ask."""
    trial = Trial("experts", OPS["experts"].reference, Manifest(weights=("plain", "fp8")), "a:b")
    assert not list(LAWS["large_offset"].cases(trial))


def test_every_level_of_simd_but_the_one_in_use_is_an_environment_of_its_own():
    pytest.importorskip("numba", reason="finds the levels of this CPU")
    from refimpl.kernels.simd_llvm import available

    found = [dict(e)["REFIMPL_SIMD"] for e in environments("linear", "cpu")]
    assert found == list(available()[:-1]) and not environments("rope", "cpu")


def test_numbers_of_threads_are_what_they_were_after_the_law_of_threads():
    team = pytest.importorskip("refimpl.kernels.team", reason="Numba counts threads")
    before = team.threads()
    assert judge(row("rms_norm", "cpu"), ["threads"])[-1].passed and team.threads() == before


# --- no green without a verdict -----------------------------------------------------------------------------


def verdicts_on(name, *args, code=1):
    """Of a kernel of tests/broken_kernels.py."""
    kernel = f"tests.broken_kernels:{name}"
    return json.loads(command("--op", "rms_norm", "--kernel", kernel, "--json", *args, code=code))


@pytest.mark.parametrize(
    ("name", "law", "why", "args"),
    [
        ("leaves", "survives", "SystemExit in line", ()),
        ("leaves_at_once", "survives", "exit code 0", ()),
        ("aborts", "survives", "SIGABRT", ()),
        ("segfaults", "survives", "SIGSEGV", ()),
        ("reads_past_the_end", "survives", "SIGSEGV", ("--law", "guarded")),
        ("reads_before_the_start", "survives", "SIGSEGV", ("--law", "guarded")),
        ("hoards", "survives", "GB of memory", ("--memory", "1.5")),
        ("hangs", "returns", "no end after 4 s", ("--seconds", "4")),
        ("nothing", "form", "a NoneType, not an array", ()),
        ("numbers_one_by_one", "form", "a generator, not an array", ()),
        ("a_list", "form", "a list, not an array", ()),
        ("and_none", "form", "2 results instead of 1", ()),
        ("wide", "form", "float64, not float32", ()),
        ("transposed", "form", "has shape", ()),
        ("raises", "form", " of broken_kernels.py: not today", ()),
    ],
)
def test_what_does_not_even_answer_is_one_failure_with_its_case(name, law, why, args):
    *before, verdict = verdicts_on(name, *args)
    assert all(v["passed"] for v in before) and not verdict["passed"]
    assert verdict["law"] == law and why in verdict["why"], verdict
    assert "--law" in verdict["reproduce"] and verdict["case"] in verdict["reproduce"]
    assert law != "form" or "rms_norm(x: np.ndarray" in verdict["why"], "the reference's signature"


def test_the_form_is_shown_broken_on_something_rather_than_on_nothing():
    def case(kernel):
        (verdict,) = judge(Trial("q8_0.dequantize", kernel, Manifest()), ["form"])
        assert not verdict.passed
        return json.loads(verdict.case)["data"]["blocks"]

    assert case(lambda data: q8_0.dequantize(data).astype(np.float64)) == 1
    assert case(lambda data: q8_0.dequantize(data) if data.size else None) == 0


def test_the_weight_of_a_wrong_result_is_named_with_the_bytes_of_its_block():
    def cut(data):
        d, q = q8_0.unpack(data)
        return (d[..., None] * np.maximum(q, -127).astype(np.float32)).reshape(*data.shape[:-1], -1)

    (verdict,) = [v for v in judge(Trial("q8_0.dequantize", cut, Manifest()), ["bits"]) if not v.passed]
    weight, n, spelled = re.search(
        r"is weight (\d+) of block (\d+), whose bytes are (.*)", verdict.why
    ).groups()
    block = np.frombuffer(bytes.fromhex(spelled), np.uint8)
    assert verdict.where[-1] == 32 * int(n) + int(weight)
    assert q8_0.unpack(block)[1][0, int(weight)] == -128
    wrong = judge(Trial("q4_k.dequantize", swapped, Manifest()), ["bits"])[-1]
    assert "is weight " in wrong.why and "bytes" not in wrong.why  # of 144 bytes, which are too many


def test_a_crash_is_reproduced_by_its_line_and_stdout_stays_json():
    (verdict,) = [v for v in verdicts_on("leaves_at_once") if not v["passed"]]
    words = verdict["reproduce"].split(" ", 3)[3].replace("'", "").split(" ")
    assert "exit code 0" in command(*words, code=1)
    assert all(v["passed"] for v in verdicts_on("right", "--law", "bound", "edges", code=0))


def test_a_case_has_its_seconds_of_a_processor_however_busy_the_machine_is(monkeypatch):
    now, used = 0.0, 0.0
    monkeypatch.setattr("refimpl.conformance.child.time.monotonic", lambda: now)
    monkeypatch.setattr("refimpl.conformance.child._processor_s", lambda pid: used)
    starved, asleep, spinning = (Patience(1, 20.0) for _ in range(3))
    now, used = 15.0, 1.0
    assert not (starved.ended() or asleep.ended() or spinning.ended())
    now, used = 24.0, 2.0
    assert not (starved.ended() or asleep.ended())
    now = 35.0
    assert asleep.ended(), "nothing was done for ten seconds"
    used = 21.0
    assert spinning.ended(), "it had its seconds"
    now, used = 201.0, 3.0
    assert starved.ended(), "ten times as long"


def test_a_row_after_a_crash_is_judged_all_the_same(monkeypatch):
    with Child() as child:
        crashed = child.judge(Job(Spec("rms_norm", kernel="tests.broken_kernels:segfaults")))
        fine = child.judge(Job(Spec("rope", "reference"), ("bound",)))
    assert [v.law for v in crashed] == ["survives"] and [v.passed for v in fine] == [True]


def test_a_bound_that_says_nothing_is_no_proof():
    rough = Manifest(accumulation="bfloat16")
    trial = Trial("linear", lambda x, w, a="fp8": zeros_past_256(x, w, a), rough, level=BRIEF)
    bad = [v for v in judge(trial) if not v.passed]
    assert bad and any("says nothing" in v.why for v in bad)


def zeros_past_256(x, w, activations):
    """Right where K is at most 256, and nothing at all beyond."""
    y = OPS["linear"].reference(x, w, activations)
    return y * np.float32(x.shape[-1] <= 256)


@pytest.mark.parametrize(
    "args",
    [
        ("--op", "fp8.linear", "--backend", "cpu"),
        ("--op", "rope", "--law", "nosuchlaw"),
        ("--op", "rms_nrom"),
        ("--op", "rope", "--kernel", "no.such:thing"),
        ("--op", "rope", "--kernel", NAME, "--backend", "cpu"),
        ("--op", "rope", "--kernel", NAME, "--declare", "columns=-4"),
        ("--op", "rope", "--kernel", NAME, "--declare", "rows=0"),
        ("--op", "rope", "--kernel", NAME, "--declare", "layouts=weird"),
        ("--op", "linear", "--kernel", NAME, "--declare", "modes=w8a8"),
        ("--op", "fp8.linear", "--kernel", NAME, "--declare", "weights=q4_k"),
        ("--op", "rope", "--backend", "cpu", "--law", "bound", "--case", '{"tokens":3}'),
        ("--declare", "columns=4"),
    ],
)
def test_a_wrong_question_is_neither_a_verdict_nor_a_traceback(args):
    assert command(*args, code=2) == ""


def test_nothing_judged_is_nothing_proved():
    command("--op", "rope", "--law", "one_hot", code=1)


def test_help_needs_no_hypothesis_and_a_verdict_does():
    hide = "import importlib.util as u; u.find_spec = lambda name: None; "
    for args, code in ((["--help"], 0), (["--op", "rope"], 1)):
        main = "from refimpl.cli import run; from refimpl.conformance import main; "
        main += f"raise SystemExit(run(main, {args}))"
        done = subprocess.run([sys.executable, "-c", hide + main], capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert code == 0 or "E8010" in done.stderr


@pytest.mark.parametrize(
    "result, told", [("[..., 1:]", "has shape"), (".astype(np.float64)", "is float64, not float32")]
)
def test_a_wrong_shape_or_dtype_is_told_once(result, told, tmp_path):
    """And not again by every law after it."""
    head = "import numpy as np\nfrom refimpl.formats import q8_0\n"
    (tmp_path / "mine.py").write_text(f"{head}def decode(x): return q8_0.dequantize(x){result}\n")
    args = ["--op", "q8_0.dequantize", "--kernel", "mine:decode", "--level", "smoke", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "refimpl.conformance", *args],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    verdicts = json.loads(done.stdout)
    assert [(v["law"], v["passed"]) for v in verdicts] == [("form", False)] and told in verdicts[0]["why"]


def test_the_console_script_finds_a_kernel_in_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from refimpl.reference.attention import rope as turn\n")
    entry = "import sys; sys.path.remove(''); from refimpl.__main__ import entry; sys.exit(entry())"
    args = ["conformance", "--op", "rope", "--kernel", "mine:turn", "--law", "bound"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", entry, *args], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- what a stranger brings ---------------------------------------------------------------------------------

TERNARY = '''"""Ternary weights: 16 in four bytes."""
import numpy as np
NAME, WEIGHTS = "TERN", 16
BLOCK = np.dtype([("qs", "u1", 4), ("d", "<f2")])
PARTS = ("d", "q")

def unpack(data):
    b = np.ascontiguousarray(data).view(BLOCK).reshape(*data.shape[:-1], data.shape[-1] // 6)
    q = (b["qs"][..., None] >> (2 * np.arange(4, dtype=np.uint8))) & 3
    return b["d"].astype(np.float32), q.reshape(*b.shape, 16).astype(np.int8) - np.int8(1)

def dequantize(data):
    d, q = unpack(data)
    return (d[..., None] * q.astype(np.float32)).reshape(*data.shape[:-1], data.shape[-1] // 6 * 16)
'''
STRANGER = """import numpy as np, tern
def decode(data):
    return tern.dequantize(data)
def shifted(data):
    return tern.dequantize(data) * np.float32(2)
def prepared(w):
    return np.ascontiguousarray(tern.dequantize(w.data).reshape(w.shape).T)
def product(x, w, activations="fp8"):
    return x @ w
def twice(x, w, activations="fp8"):
    return 2 * (x @ w.T)
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A folder with a format and kernels that this project knows nothing of."""
    (tmp_path / "tern.py").write_text(TERNARY)
    (tmp_path / "theirs.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(OPS), draws.WEIGHTS, dict(draws.FORMATS), dict(formats.FORMATS), dict(formats.TYPES)
    yield tmp_path
    draws.WEIGHTS = before[1]
    tables = (OPS, draws.FORMATS, formats.FORMATS, formats.TYPES)
    for changed, kept in zip(tables, (before[0], *before[2:])):
        changed.clear()
        changed.update(kept)


def test_a_format_without_a_row_is_judged_by_its_own_reference(stranger):
    brought = ("--op", "tern.dequantize", "--format", "tern.py")
    good = json.loads(command(*brought, "--kernel", "theirs:decode", "--json", code=0))
    assert {"bits", "exhaustive", "real_sizes", "layouts"} <= {v["law"] for v in good}
    (bad,) = json.loads(command(*brought, "--kernel", "theirs:shifted", "--law", "bits", "--json", code=1))
    assert bad["reproduce"].startswith("python -m refimpl.conformance --op tern.dequantize")
    assert "--format tern.py" in bad["reproduce"]


def test_weights_may_be_prepared_and_their_format_be_a_stranger_s(stranger):
    declared = ("--declare", "weights=tern", "modes=exact", "prepare=theirs:prepared", "--json")
    kernel = ("--format", "tern.py", "--kernel", "theirs:product")
    verdicts = json.loads(command("--op", "linear", *kernel, *declared, code=0))
    assert {"dyadic", "one_hot"} <= {v["law"] for v in verdicts}


def test_an_operation_without_a_row_is_judged_by_the_reference_that_is_brought(stranger):
    reference = ("--reference", "refimpl.reference.attention:rope", "--kernel")
    ours = "refimpl.kernels.norm_rope_numba:rope"
    assert "1 passed" in command("--op", "rope", *reference, ours, "--law", "bound", code=0)
    assert command("--op", "my.thing", *reference, "theirs:decode", code=2) == ""
    twice = ("--op", "my.linear", "--reference", "theirs:twice", "--kernel", "theirs:twice", "--law", "bound")
    assert command(*twice, "--declare", "weights=plain", code=2) == "", "no product of a linear layer"
    no_format = ("--format", "theirs.py", "--kernel", "theirs:decode")
    assert command("--op", "tern.dequantize", *no_format, code=2) == ""


# --- what strangers declare ---------------------------------------------------------------------------------


def half_inputs(x, w, activations="fp8"):
    """W8A16: activations in bfloat16, sums in float32, stored as bfloat16."""
    taken = bounds.taken(Manifest(input="bfloat16"), x)
    return bounds.taken(Manifest(input="bfloat16"), OPS["linear"].reference(taken, w, "exact"))


def in_q8_0_under_floats(x, w, activations="fp8"):
    """Activations in Q8_0 with a scale in float32."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    step = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(all="ignore"):
        codes = np.where(step > 0, np.rint(groups / step), 0)
    return (codes * step).astype(np.float32).reshape(x.shape) @ dense(w).T


def in_q8_1(x, w, activations="fp8"):
    """Activations in Q8_1 beside Q4_1: codes, a scale and a sum of each 32, the last two as halves."""
    groups = x.reshape(-1, x.shape[-1] // 32, 32)
    step = np.abs(groups).max(axis=-1) / np.float32(127)
    with np.errstate(all="ignore"):
        codes = np.where(step[..., None] > 0, np.rint(groups * (np.float32(1) / step)[..., None]), 0)
    d, s = (v.astype(np.float16).astype(np.float32) for v in (step, step * codes.sum(axis=-1)))
    scale, minimum, q = (p.astype(np.float32) for p in q4_1.unpack(w.data))
    products = np.einsum("tbi,nbi,tb,nb->tn", codes, q, d, scale, optimize=True)
    return (products + s @ minimum.T).astype(np.float32).reshape(*x.shape[:-1], len(minimum))


def by_reciprocals(x):
    """vLLM's: no magnitude below 1e-10, and products with the reciprocal of the scale."""
    pad = np.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(len(x), -(-x.shape[1] // 128), 128)
    scale = (np.maximum(np.abs(pad).max(axis=-1), np.float32(1e-10)) / np.float32(448)).astype(np.float32)
    codes = e4m3.encode(pad * (np.float32(1) / scale)[..., None])
    return codes.reshape(len(x), pad.shape[1] * 128)[:, : x.shape[1]], scale


def unsorted_route(x, weight, bias, c):
    """The same choice, worst first."""
    ids, weights = OPS["route"].reference(x, weight, bias, c)
    return ids[:, ::-1].copy(), weights[:, ::-1].copy()


def one_stack(x, ids, weights, gate, up, down, activations="fp8"):
    """Experts that lie one behind the other, of one type."""
    assert all(isinstance(side, Packed) for side in (gate, up, down))
    return OPS["experts"].reference(x, ids, weights, gate, up, down, activations)


FLOAT_SCALES = {"quantized": "q8_0 float", "modes": "fp8", "shows_nan": False, "threads": False}
HALVES = {"input": "bfloat16", "output": "bfloat16", "modes": "exact", "threads": False}
DECLARED = [
    ("linear", half_inputs, HALVES, "fp8"),
    ("linear", in_q8_0_under_floats, FLOAT_SCALES, "q8_0"),
    ("linear", in_q8_1, FLOAT_SCALES | {"quantized": "q8_1"}, "q4_1"),
    ("fp8.act_quant", by_reciprocals, {"activations": "nearest", "least": 1e-10, "dimensions": False}, None),
    ("route", unsorted_route, {"order": "any"}, None),
    ("experts", one_stack, {"lists": False}, "q4_k"),
]


@pytest.mark.parametrize(
    ("op", "kernel", "declared", "kind"),
    DECLARED,
    ids=lambda v: getattr(v, "__name__", None) or re.sub("0x[0-9a-f]+", "", str(v))[:30],
)
def test_an_honest_stranger_passes_by_what_it_declares_and_not_without(op, kernel, declared, kind):
    weights = {"weights": kind} if kind else {}
    for said, fine in ((declared, True), ({k: v for k, v in declared.items() if k == "modes"}, False)):
        manifest = Manifest().with_values(said | weights, "test")
        broken = [v for v in judge(Trial(op, kernel, manifest, "a:b", BRIEF), stop=True) if not v.passed]
        assert (not broken) == fine, report.text(broken)
