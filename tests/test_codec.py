"""The compiled codecs against their references, bit by bit, where the conformance suite asks for less.

The suite judges the same rows of OPS with every NaN's bits (see `refimpl.conformance.lookup.row`): arbitrary
bytes and layouts of what is decoded, all halves, all codes, all ties, work for many threads. Here are numbers
that the suite leaves out of quantizing (NaN, infinities, scales beyond the halves), and what is no law.
"""

import importlib
import inspect
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import formats, ops
from refimpl.checkpoint import codecs
from refimpl.conformance import lookup
from refimpl.conformance.inputs import arrays, draws
from refimpl.errors import RefimplError
from refimpl.formats import bf16, f16, f32, q8_0, q8_k
from refimpl.ops import CODEC, OPS
from refimpl.reference import fp8, packed
from refimpl.tensors import Packed, ScaledFP8

CASES = [(name, "cpu") for name, op in OPS.items() if op.fast.get("cpu", "").startswith(CODEC + ":")]
COMPILED = [m for m in ops.STORED if (f"{m.NAME.lower()}.dequantize", "cpu") in CASES]
QUANTIZERS = [name for name, _ in CASES if name.endswith(".quantize")]
every_case = pytest.mark.parametrize("name, backend", CASES)

SHAPES = st.lists(st.integers(1, 3), max_size=2)  # the reference cannot reshape zero rows


KINDS, POWERS = st.sampled_from(sorted(draws.FLOATS)), st.integers(-149, 127)


def numbers(draw, rows, columns, kinds):
    """f32 [rows, columns] of kinds that the suite has too, of any size, random patterns among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return draws.floats(rng, [draw(kinds) for _ in range(rows)], [draw(POWERS) for _ in range(rows)], columns)


@st.composite
def floats(draw, multiple):
    """f32 [..., n*multiple]: each row of another kind."""
    shape, n = draw(SHAPES), draw(st.integers(0, 3))
    return numbers(draw, math.prod(shape), n * multiple, KINDS).reshape(*shape, n * multiple)


@st.composite
def matrices(draw):
    """f32 [N, K] of a few ragged tiles, of up to three kinds of numbers."""
    n, k = draw(st.sampled_from([1, 5, 128, 130])), draw(st.sampled_from([1, 127, 128, 300]))
    few = numbers(draw, 3, k, KINDS)
    return few[np.arange(n) % 3]


@st.composite
def tiles(draw):
    """ScaledFP8 of any codes under scales of any pattern."""
    n, k = draw(st.sampled_from([0, 1, 5, 128, 130])), draw(st.sampled_from([0, 1, 127, 128, 300]))
    codes = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, (n, k), np.uint8)
    return ScaledFP8(codes, numbers(draw, -(-n // 128), -(-k // 128), KINDS))


INPUTS = {
    **{
        f"{module.NAME.lower()}.quantize": floats(module.WEIGHTS)
        for module in COMPILED
        if f"{module.NAME.lower()}.quantize" in QUANTIZERS
    },
    "fp8.act_quant": floats(97),
    "fp8.weight_quant": matrices(),
    "fp8.weight_dequant": tiles(),
}


# The same numbers, laid out otherwise.
LAYOUTS = arrays.LAYOUTS | {
    "read-only at an odd address": lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(
        x.shape
    )
}


def fast_path(name, backend):
    """The compiled function. Where it cannot be imported: a failure on a machine with a C compiler, a skip on
    one without.
    """
    module, function = OPS[name].fast[backend].split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        if shutil.which("cc") or shutil.which("gcc"):
            pytest.fail(
                f"{module} is not built ({error}): pip install -e .  or  python setup.py build_ext --inplace"
            )
        pytest.skip(f"{module} is not built, and there is no C compiler")


def parts(x):
    """The arrays of an input or a result."""
    return x if isinstance(x, tuple) else (x,)


def laid_out(layout, x):
    return ScaledFP8(*map(LAYOUTS[layout], x)) if isinstance(x, tuple) else LAYOUTS[layout](x)


def bits(x):
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def outcome(function, x):
    try:
        return function(x)
    except ValueError as error:
        return str(error)


def assert_equal(name, backend, x):
    before = [part.tobytes() for part in parts(x)]
    with np.errstate(all="ignore"):  # NaN and overflow are among the inputs
        fast, true = outcome(fast_path(name, backend), x), outcome(OPS[name].reference, x)
    if isinstance(true, str):
        assert fast == true
        return
    assert type(fast) is type(true) and len(parts(fast)) == len(parts(true))
    for one, other in zip(parts(fast), parts(true)):
        assert (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
        assert np.array_equal(bits(one), bits(other))
    assert [part.tobytes() for part in parts(x)] == before, "the input was written to"


# The table


def test_every_fast_path_that_quantizes_has_inputs_here():
    assert {
        name for name, _ in CASES if name.startswith("fp8.") or name.endswith(".quantize")
    } == INPUTS.keys()


def test_the_suite_asks_for_every_bit_of_a_nan():
    assert {lookup.row(*case).manifest.nan for case in CASES} == {"bits"}


def test_every_public_function_of_the_codec_is_in_the_table():
    fast_path(*CASES[0])
    public = {
        name
        for name, value in vars(importlib.import_module(CODEC)).items()
        if callable(value) and not name.startswith("_")
    }
    assert public - {"set_threads"} == {
        target.split(":")[1]
        for op in OPS.values()
        for target in op.fast.values()
        if target.startswith(CODEC + ":")
    }


@every_case
def test_a_fast_path_is_loaded_for_its_backend_and_the_reference_for_others(name, backend):
    assert ops.load(name, backend) is fast_path(name, backend)
    assert ops.load(name, "reference") is OPS[name].reference


@every_case
def test_a_fast_path_says_what_it_does(name, backend):
    assert inspect.getdoc(fast_path(name, backend)).startswith(("u8 [", "f32 ["))


# The same bits


@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if case[0] in INPUTS])
@given(data=st.data())
def test_a_fast_path_has_the_bits_of_its_reference(name, backend, data):
    x, layout = data.draw(INPUTS[name]), data.draw(st.sampled_from(sorted(LAYOUTS)))
    assert_equal(name, backend, laid_out(layout, x))


@pytest.mark.parametrize(
    "module", [m for m in COMPILED if len(draws.half_fields(m)) == 2], ids=lambda module: module.NAME
)
def test_of_two_nan_the_same_one_is_kept_whatever_the_number_of_blocks(module):
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        b = rng.integers(0, 256, n * module.BLOCK.itemsize, np.uint8).view(module.BLOCK)
        for field in draws.half_fields(module):
            b[field].view("<u2")[...] = rng.choice(
                np.array([0x7C01, 0xFC01, 0x7E01, 0xFE02, 0x7C00, 0xFC00], "<u2"), n
            )
        assert_equal(f"{module.NAME.lower()}.dequantize", "cpu", b.view(np.uint8))


@pytest.mark.parametrize("power", range(-149, 128))
def test_blocks_of_every_size_are_quantized_alike(power):
    """Through subnormal and zero scales at one end to scales beyond the halves at the other."""
    x = np.ldexp(np.random.default_rng(power + 149).uniform(-1, 1, 1024), power).astype(np.float32)
    for name in QUANTIZERS:
        assert_equal(name, "cpu", x)


# Edges


@pytest.mark.parametrize("name", [name for name, _ in CASES if name.startswith("e4m3")])
def test_a_single_number_gives_a_single_number(name):
    for number in (3, 0x7F):
        assert_equal(name, "cpu", np.array(number, np.uint8 if name == "e4m3.decode" else np.float32))


@every_case
def test_no_numbers_give_no_numbers(name, backend):
    dtype = np.uint8 if name.endswith(("dequantize", "decode")) else np.float32
    for shape in ((0, 3), (3, 0), (0, 0)) if "weight" in name else ((0,), (3, 0), (2, 1, 0)):
        x = np.zeros(shape, dtype)
        assert_equal(name, backend, fp8.weight_quant(x) if name == "fp8.weight_dequant" else x)


@pytest.mark.parametrize("module", COMPILED, ids=lambda module: module.NAME)
def test_zero_rows_keep_their_shape(module):
    decode = fast_path(f"{module.NAME.lower()}.dequantize", "cpu")
    assert decode(np.zeros((0, 2 * module.BLOCK.itemsize), np.uint8)).shape == (0, 2 * module.WEIGHTS)


@every_case
def test_a_wrong_shape_or_dtype_is_refused_in_the_words_of_the_reference(name, backend):
    wrong = {
        "dequantize": [
            np.zeros(33, np.uint8),
            np.zeros((2, 145), np.uint8),
            np.zeros(1680 * 34, np.int8),
            np.zeros(0, np.float32),
            np.uint8(0),
        ],
        "quantize": [np.zeros(31, np.float32), np.zeros((2, 257), np.float32), np.float32(0)],
    }.get(name.split(".")[1], [])
    for x in wrong[2:] if name == "bf16.quantize" else wrong:
        with pytest.raises(ValueError) as fast:
            fast_path(name, backend)(x)
        with pytest.raises(ValueError) as true:
            OPS[name].reference(x)
        assert str(fast.value) == str(true.value)


def test_codes_that_are_not_bytes_are_refused():
    for codes in (np.zeros(3, np.int8), np.zeros(3, np.int64), [1.0]):
        with pytest.raises(ValueError, match="expected u8 codes"):
            fast_path("e4m3.decode", "cpu")(codes)


@pytest.mark.parametrize("name", [name for name, _ in CASES if name.endswith((".quantize", ".encode"))])
def test_other_floats_become_float32_first(name):
    x = np.random.default_rng(0).standard_normal(512)
    assert_equal(name, "cpu", x)
    assert_equal(name, "cpu", x.astype(np.float16))
    assert_equal(name, "cpu", x.astype(">f4"))


@pytest.mark.parametrize(
    "module",
    [m for m in COMPILED if f"{m.NAME.lower()}.quantize" in QUANTIZERS and m is not bf16],
    ids=lambda module: module.NAME,
)
def test_the_reference_is_called_only_for_blocks_beyond_the_range_of_scales(module, monkeypatch):
    """Else the comparisons above could compare the reference with itself."""
    fast = fast_path(f"{module.NAME.lower()}.quantize", "cpu")
    monkeypatch.setattr(module, "quantize", lambda x: "the reference")
    x = np.random.default_rng(0).uniform(-1, 1, (3, 256)).astype(np.float32)
    for factor in (0, 1e-35, 1e-7, 1, 6e4):
        assert isinstance(fast(x * np.float32(factor)), np.ndarray)
    searched = module not in (q8_0, q8_k) and module.WEIGHTS == 256
    for beyond in (np.nan, -np.nan, np.inf, -np.inf, 2e18 if searched else 1e-38):
        x[1], x[1, 5] = 0, beyond
        assert fast(x) == "the reference"


# Threads


@pytest.fixture
def threads():
    """Sets the number of threads; as many as before afterwards."""
    set_threads = importlib.import_module(CODEC).set_threads
    yield set_threads
    set_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    """In a process of its own, since a fork of pytest's would inherit whatever threads other tests left."""
    code = f"""
import os, sys, numpy as np
from {CODEC} import dequantize_q8_0, set_threads
set_threads(2)
data = np.zeros((64, 34 * 256), np.uint8)
dequantize_q8_0(data)
child = os.fork()
if child == 0:
    set_threads(2)
    os._exit(0 if dequantize_q8_0(data).shape == (64, 8192) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=60).returncode == 0
    )


def test_threads_are_set_with_all_others(monkeypatch):
    fast_path(*CASES[0])
    told = []
    monkeypatch.setattr(importlib.import_module(CODEC), "set_threads", told.append)
    ops.set_threads(2)
    assert told == [2]
    with pytest.raises(ValueError, match="at least 1"):
        ops.set_threads(0)


def test_fewer_than_one_thread_is_refused(threads):
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        threads(0)


# What commands call


@pytest.mark.parametrize("module", [f32, f16, *ops.STORED], ids=lambda module: module.NAME)
def test_tensors_are_decoded_and_quantized_as_by_the_formats(module):
    x = np.random.default_rng(9).standard_normal((3, 512)).astype(np.float32)
    kind = module.GGML_TYPE
    if hasattr(module, "quantize"):
        assert np.array_equal(codecs.quantize(kind, x), formats.quantize(kind, x))
        data = formats.quantize(kind, x)
    else:
        data = np.full((3, formats.row_bytes(kind, 512)), 7, np.uint8)
        with pytest.raises(RefimplError, match="E1303"):
            codecs.quantize(kind, x)
    assert np.array_equal(codecs.dequantize(kind, data), formats.dequantize(kind, data))
    w = Packed(data, kind, (3, 512))
    assert np.array_equal(codecs.dense(w), packed.dense(w))


def test_weights_of_every_kind_become_arrays():
    x = np.random.default_rng(10).standard_normal((130, 300)).astype(np.float32)
    w = fp8.weight_quant(x)
    assert np.array_equal(codecs.dense(w), packed.dense(w))
    assert np.array_equal(codecs.dense([w, w]), packed.dense([w, w]))
    assert codecs.dense(x) is x


# Without the extension


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, CODEC, None)
    ops._import.cache_clear()
    yield
    ops._import.cache_clear()


def test_without_the_extension_the_references_run_and_one_note_says_so(no_extension, capsys):
    for name, backend in CASES:
        assert ops.load(name, backend) is OPS[name].reference
    out, note = capsys.readouterr()
    assert out == "" and note.count("\n") == 1
    assert CODEC in note and "numpy references" in note


def test_a_function_missing_from_a_built_module_is_an_error(monkeypatch):
    fast_path(*CASES[0])
    monkeypatch.setitem(OPS, "no such", ops.Op(q8_0.dequantize, "bits", {"cpu": f"{CODEC}:no_such"}))
    with pytest.raises(AttributeError):
        ops.load("no such", "cpu")


def test_the_extension_is_not_imported_before_it_is_asked_for():
    code = f"import sys, refimpl.ops, refimpl.model; sys.exit({CODEC!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
