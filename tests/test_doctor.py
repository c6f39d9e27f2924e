"""What the doctor says of machines that lack one thing or another."""

import json
import pathlib
import re
import tomllib

import pytest

from refimpl import doctor, ops
from refimpl.devices import machine

ROOT = pathlib.Path(__file__).parents[1]


def the(name, found=None):
    return [f for f in found or machine.findings() if f.name == name]


def test_the_doctor_tells_every_part_and_what_a_missing_one_costs(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for part in ("system", "CPU", "RAM", "C compiler", "codecs", "Numba", "SIMD", "cache", "disk", "torch"):
        assert re.search(rf"^(ok|missing) +{part} ", out, re.M), part
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"].startswith("everything works")
    for f in found["findings"]:
        assert f["state"] == "ok" or (f["costs"] and f["do"]), f


def test_the_doctor_needs_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", d)[0] for d in project["dependencies"]}
    assert set(machine.NEEDED) == names - {"prompt_toolkit", "rich"}  # of a terminal, and done without
    brought = {e: " ".join(project["optional-dependencies"][e]) for e in machine.EXTRAS}
    for extra, (modules, _) in machine.EXTRAS.items():
        assert all(m in brought[extra] for m in modules)


def test_what_is_missing_is_told_and_only_the_essential_ends_in_1(monkeypatch, capsys):
    real = machine.find_spec

    def without(*absent):
        monkeypatch.setattr(machine, "find_spec", lambda name: None if name in absent else real(name))

    without("torch", "fastapi", "rich")
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"missing +torch +not installed\n +what is lost: the backend `cuda`", out)
    assert 'pip install "refimpl[server]"' in out and "plain prompt" in out
    without("numba", "yaml")
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "not installed: numba, pyyaml" in out and "1 of these must be put right" in out


def test_a_machine_without_compiler_cache_or_fast_instructions(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(ops, "CODEC", "refimpl.kernels.none_such")
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("REFIMPL_SIMD", "generic")
    found = {f.name: f for f in machine.findings()}
    for name in ("C compiler", "codecs", "cache", "SIMD"):
        assert found[name].state == machine.LACKING and found[name].costs and found[name].do
    monkeypatch.setenv("REFIMPL_SIMD", "altivec")
    assert the("Numba")[0].state == machine.WRONG and "E5020" in the("Numba")[0].found


def test_the_doctor_tells_a_gpu_by_torch(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `gpu`")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "GPU_DEVICES", (str(tmp_path / "dxg"),))

    def gpu():
        return the("GPU", [*machine._gpu()])

    assert [f.found for f in gpu()] == ["none"]
    (tmp_path / "dxg").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in gpu()[0].found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch sees no GPU" in gpu()[0].found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (20 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A Card")
    assert gpu() == [machine.Finding("GPU", "ok", "cuda:0, A Card, 20.0 GB free of 24.0 GB")]


def test_the_doctor_s_flag_needs_its_folder(capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--for", "sglang-kt"])
    assert "needs the DIR" in capsys.readouterr().err


def test_a_gpu_is_looked_for_where_wsl2_has_it_and_not_without_a_driver(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `gpu`")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1) or True)
    assert "/dev/dxg" in ops.GPU_DEVICES and "/dev/nvidiactl" in ops.GPU_DEVICES
    monkeypatch.setattr(ops, "GPU_DEVICES", (str(tmp_path / "none"), str(tmp_path / "dxg")))
    assert not ops.sees_gpu() and not asked
    (tmp_path / "dxg").touch()
    assert ops.sees_gpu() and asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not ops.sees_gpu()
