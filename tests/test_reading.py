"""Loading has the pages of mapped weights at hand, where there is memory for them."""

import resource
import sys

import numpy as np
import pytest

import refimpl
from refimpl.checkpoint import names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.devices.cpu import CpuBackend
from refimpl.loading import reading
from refimpl.tensors import Interleaved


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.fixture
def touched(monkeypatch):
    """The pieces that are touched."""
    found, touch = [], reading._touch
    monkeypatch.setattr(reading, "_touch", lambda piece: found.append(piece) or touch(piece))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_the_first_token_meets_no_page_that_is_not_there(hybrid_folder):
    checkpoint = Checkpoint.open(hybrid_folder)
    reading.ahead(checkpoint, CpuBackend("cpu"))
    pieces = list(reading._mapped(checkpoint, False))
    before = faults()
    for piece in pieces:
        piece.max()
    # Untouched, one fault brings sixteen pages or so.
    assert faults() - before < sum(p.size for p in pieces) / reading.PAGE / 64


def test_every_tensor_is_read_whole(hybrid_folder, touched):
    model = refimpl.load(hybrid_folder, "cpu", repack="no")
    stored = [info for name in model.checkpoint for info in model.checkpoint.stored(name)]
    assert sum(p.size for p in touched) == sum(info.nbytes for info in stored)


def test_a_gpu_wants_its_experts_of_the_host_alone(hybrid_folder, touched):
    checkpoint, backend = Checkpoint.open(hybrid_folder), CpuBackend("cpu")
    backend.name = "cuda"
    reading.ahead(checkpoint, backend)
    stored = [i for name in checkpoint if names.is_routed_expert(name) for i in checkpoint.stored(name)]
    assert 0 < sum(p.size for p in touched) == sum(info.nbytes for info in stored)


@pytest.mark.parametrize("repack", ["auto", "yes"])
def test_a_copy_that_was_kept_is_read_in_place_of_what_it_was_made_from(
    hybrid_folder, touched, monkeypatch, tmp_path, repack
):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    model = refimpl.load(hybrid_folder, "cpu", repack=repack)
    checkpoint = model.checkpoint
    copied = [n for n in checkpoint if isinstance(checkpoint[n], Interleaved)]
    if not copied:
        pytest.skip("this CPU gains nothing from rows side by side")
    originals = [checkpoint.mapped(info) for n in copied for info in checkpoint.stored(n)]
    assert not any(np.shares_memory(p, o) for p in touched for o in originals)
    for name in copied:  # one in memory has been written just now
        assert any(np.shares_memory(p, checkpoint[name].data) for p in touched) == (repack == "yes")


def test_what_does_not_fit_into_memory_is_left_where_it_is(hybrid_folder, touched, monkeypatch):
    monkeypatch.setattr(reading, "free_ram", lambda: 1000)
    refimpl.load(hybrid_folder, "cpu", repack="no")
    assert touched == []


def test_slow_files_are_left_for_later(hybrid_folder, monkeypatch, capsys):
    monkeypatch.setattr(reading, "PATIENCE", -1)
    refimpl.load(hybrid_folder, "cpu", repack="no")
    assert "the files are read slowly" in capsys.readouterr().err


def test_long_reading_is_shown(hybrid_folder, monkeypatch, capsys):
    monkeypatch.setattr(reading, "SHOWN", 0)
    refimpl.load(hybrid_folder, "cpu", repack="no")
    assert "reading weights: " in capsys.readouterr().err
