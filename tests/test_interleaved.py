"""Rows side by side: the order of bytes, the kernels that read it, and the copies that loading makes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import chat, plan
from refimpl.conformance.inputs.draws import activations, packed
from refimpl.errors import RefimplError
from refimpl.formats import q4_k, q5_k, q6_k
from refimpl.loading import interleaving
from refimpl.reference import interleaved, linear
from refimpl.reference.experts import experts, pick
from refimpl.reference.packed import dense
from refimpl.tensors import Interleaved, Packed

ROWS = interleaved.ROWS
EXPERTS = "blk.1.ffn_gate_exps.weight"


# --- the order of bytes -------------------------------------------------------------------------------------


@given(
    stack=st.lists(st.integers(1, 3), max_size=2),
    tiles=st.integers(1, 6),
    blocks=st.integers(1, 20),
    module=st.sampled_from(interleaved.FORMATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_interleaved_comes_back(stack, tiles, blocks, module, seed):
    shape, row_bytes = (*stack, tiles * ROWS, blocks * 256), blocks * module.BLOCK.itemsize
    data = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], row_bytes), np.uint8)
    w = Packed(data, module.GGML_TYPE, shape)
    found = interleaved.interleave(w)
    assert found.shape == shape and found.data.shape == data.shape and found.data.ctypes.data % 64 == 0
    back = interleaved.plain(found)
    assert back.shape == shape and back.ggml_type == w.ggml_type
    np.testing.assert_array_equal(back.data, data)


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [(16, [1]), (32, [8]), (48, [5, 4]), (80, [7, 7, 7, 7]), (32, [6, 6, 5])],
)
def test_words_lie_in_the_order_that_the_reference_draws(rows, lengths):
    """Group by group, part by part, tile by tile, word by word, row by row."""
    w = packed(np.random.default_rng(rows), q4_k, rows, 256 * sum(lengths))
    words, wanted = w.data.view(np.uint32), []
    for group in range(0, rows, 32):
        block = 0
        for length in lengths:
            for tile in range(group, min(group + 32, rows), 16):
                for word in range(36 * block, 36 * (block + length)):
                    wanted += [words[tile + r, word] for r in range(16)]
            block += length
    found = interleaved.interleave(w).data.reshape(-1).view(np.uint32)
    np.testing.assert_array_equal(found, np.array(wanted))


def test_a_tile_of_q6_k_has_its_words_in_the_order_of_their_use_and_d_behind_them():
    w = packed(np.random.default_rng(6), q6_k, ROWS, 512)
    blocks, wanted = w.data.view(q6_k.BLOCK).reshape(ROWS, 2), b""
    for block in range(2):
        wanted += blocks["scales"][:, block].copy().view(np.uint32).T.tobytes()
        for part in range(2):
            for k in range(0, 32, 4):
                low, high = (blocks[f][:, block].reshape(ROWS, 2, -1) for f in ("ql", "qh"))
                for at in (low[:, part, k : k + 4], low[:, part, 32 + k : 36 + k], high[:, part, k : k + 4]):
                    wanted += at.tobytes()
        wanted += blocks["d"][:, block].tobytes()
    assert interleaved.interleave(w).data.tobytes() == wanted


def test_only_whole_tiles_of_known_formats_are_interleaved():
    rng = np.random.default_rng(0)
    for w in (packed(rng, q4_k, ROWS + 1, 256), packed(rng, q5_k, ROWS, 256)):
        assert interleaved.where_possible(w) is w
        with pytest.raises(ValueError, match="not interleaved"):
            interleaved.interleave(w)
    plain_floats = np.ones((ROWS, 256), np.float32)
    assert interleaved.where_possible(plain_floats) is plain_floats


@pytest.mark.parametrize("module", interleaved.FORMATS)
def test_references_read_both_orders_alike(module):
    rng = np.random.default_rng(1)
    w = packed(rng, module, 4, 2 * ROWS, 512)
    beside = interleaved.interleave(w)
    np.testing.assert_array_equal(dense(beside), dense(w))
    x = activations(rng, "normal", 3, 512)
    for e in range(4):
        np.testing.assert_array_equal(linear.linear(x, pick(beside, e)), linear.linear(x, pick(w, e)))
    up, down = packed(rng, q4_k, 4, 256, 512), packed(rng, module, 4, 512, 256)
    ids, shares = np.array([[0, 3], [3, 1], [2, 0]]), np.ones((3, 2), np.float32)
    sides = [interleaved.interleave(s) for s in (up, up, down)]
    np.testing.assert_array_equal(experts(x, ids, shares, *sides), experts(x, ids, shares, up, up, down))


# --- kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", interleaved.FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 21])
def test_the_bits_are_those_of_panels_whatever_the_number_of_tokens(tokens, module):
    pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
    from refimpl.kernels import linear_numba

    rng = np.random.default_rng(2)
    columns = 256 * 17  # three parts, the last of them shorter; two groups and a single tile
    w = packed(rng, module, 5 * ROWS, columns)
    x = activations(rng, "outliers", 21, columns)
    wanted = linear_numba.linear(x, w)  # panels take each block's floats in the same order
    found = linear_numba.linear(x[:tokens], interleaved.interleave(w))
    np.testing.assert_array_equal(found.view(np.uint32), wanted[:tokens].view(np.uint32))


# --- loading ------------------------------------------------------------------------------------------------


def stack_of(model):
    """A layer's gate matrices, as its operation has them."""
    return model.layers[1].mlp.experts.keywords["gate"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "interleaved"


@pytest.fixture
def cpu():
    pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
    return "cpu"


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*")) if cache.exists() else []


def test_loading_interleaves_in_memory_and_the_answer_stays(hybrid_folder, cache, cpu):
    ids = [5, 9, 2, 7]
    plain = refimpl.load(hybrid_folder, backend=cpu, repack="no")
    model = refimpl.load(hybrid_folder, backend=cpu)
    assert isinstance(stack_of(plain), Packed) and isinstance(stack_of(model), Interleaved)
    np.testing.assert_array_equal(interleaved.plain(stack_of(model)).data, stack_of(plain).data)
    assert list(model.generate(ids, 8)) == list(plain.generate(ids, 8))
    assert not kept(cache)


def test_a_kept_copy_is_made_once_and_known_by_its_file(hybrid_folder, tmp_path, cache, cpu):
    folder = shutil.copytree(hybrid_folder, tmp_path / "model")
    first = refimpl.load(folder, backend=cpu, repack="yes")
    files = kept(cache)
    assert files and all(f.stat().st_mode & 0o077 == 0 for f in files)
    times = [f.stat().st_mtime_ns for f in files]
    again = refimpl.load(folder, backend=cpu)  # "auto" takes what is there
    assert [f.stat().st_mtime_ns for f in kept(cache)] == times
    assert not stack_of(again).data.flags.writeable  # mapped
    np.testing.assert_array_equal(stack_of(again).data, stack_of(first).data)
    for file in folder.glob("*.safetensors"):
        os.utime(file, ns=(1, 1))
    refimpl.load(folder, backend=cpu, repack="yes")
    assert len(kept(cache)) == 2 * len(files)


@pytest.mark.parametrize("harm", ["cut short", "others can write", "a link"])
def test_a_copy_that_cannot_be_trusted_is_made_anew(harm, hybrid_folder, cache, cpu, tmp_path):
    true = stack_of(refimpl.load(hybrid_folder, backend=cpu, repack="yes")).data.copy()
    for file in kept(cache):
        if harm == "cut short":
            os.truncate(file, file.stat().st_size - 1)
        elif harm == "others can write":
            file.chmod(0o666)
        else:
            file.rename(tmp_path / file.name)
            file.symlink_to(tmp_path / file.name)
    found = stack_of(refimpl.load(hybrid_folder, backend=cpu))
    assert found.data.flags.writeable  # in memory, not mapped
    np.testing.assert_array_equal(found.data, true)


def test_no_room_in_memory_leaves_the_file_as_it_is_and_says_so(
    hybrid_folder, cache, cpu, monkeypatch, capsys
):
    monkeypatch.setattr(interleaving, "free_ram", lambda: 1000)
    model = refimpl.load(hybrid_folder, backend=cpu)
    assert isinstance(stack_of(model), Packed)
    assert "left as they lie in the file" in capsys.readouterr().err


def test_slow_files_are_left_for_later(hybrid_folder, cache, cpu, monkeypatch, capsys):
    monkeypatch.setattr(interleaving, "PATIENCE", -1)
    model = refimpl.load(hybrid_folder, backend=cpu)
    assert isinstance(stack_of(model), Packed)
    assert "are read slowly" in capsys.readouterr().err


def test_no_room_on_the_disk_is_refused(hybrid_folder, cache, cpu, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(RefimplError, match="E5102"):
        refimpl.load(hybrid_folder, backend=cpu, repack="yes")
    assert not kept(cache)


@pytest.mark.parametrize("given", [{"backend": "reference"}, {"backend": "cpu", "activations": "exact"}])
def test_what_gains_nothing_is_left_alone(given, hybrid_folder, cache, capsys):
    model = refimpl.load(hybrid_folder, repack="yes", **given)
    assert not isinstance(stack_of(model), Interleaved)
    assert "not rearranged" in capsys.readouterr().err and not kept(cache)


def test_long_work_is_shown(hybrid_folder, cache, cpu, monkeypatch, capsys):
    monkeypatch.setattr(interleaving, "SHOWN", 0)
    refimpl.load(hybrid_folder, backend=cpu)
    assert "rearranging experts" in capsys.readouterr().err


def test_another_choice_is_refused(hybrid_folder):
    with pytest.raises(ValueError, match="repack must be one of"):
        refimpl.load(hybrid_folder, repack="perhaps")


def test_chat_has_the_flag():
    assert chat._parser().parse_args(["--repack", "no"]).repack == "no"
    assert chat._parser().parse_args([]).repack == "auto"


def test_the_plan_says_what_it_takes():
    inventory = plan.Inventory.builtin("deepseek-v3")
    found = interleaving.expert_bytes(inventory)
    size = {"Q4_K": 144, "Q6_K": 210}
    experts = [s for n, s in inventory.tensors.items() if ".mlp.experts." in n]
    assert found == sum(int(np.prod(s.shape)) // 256 * size[s.kind] for s in experts) > 10**11
    cost = interleaving.cost(found, 2 * found)
    assert cost.others == found
    assert "leaves too little" in cost.why_not(found) and not interleaving.cost(10**6, 10**6).why_not(10**9)
    assert "takes about" in interleaving.Cost(1, interleaving.SECONDS + 1, 0).why_not(10**9)
