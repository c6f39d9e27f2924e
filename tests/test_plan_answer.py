"""`plan --vram --ram`: does it fit, and how fast. What the parts are is tested in test_plan.py."""

import json
import re

import pytest

from refimpl import cli, plan
from refimpl.devices import memory
from refimpl.errors import RefimplError


def answer(capsys, *argv):
    assert cli.run(plan.main, [*argv]) == 0
    return capsys.readouterr().out


def test_does_it_fit_and_how_fast(capsys):
    out = answer(capsys, "--config", "deepseek-r1", "--vram", "24", "--ram", "512")
    assert out.startswith("Yes, it fits: deepseek-r1") and len(out.splitlines()) <= 10
    assert all(len(line) <= 80 for line in out.splitlines())
    assert re.search(r"GPU memory +19\.0 GB and 500\.0 MB for the driver of 24\.0 GB\n", out)
    assert "395.8 GB of 512.0 GB" in out and "assumed: eight channels of DDR5-4000" in out
    v3 = json.loads(answer(capsys, "--config", "deepseek-v3", "--vram=24", "--ram=512", "--json"))
    assert f"at most {v3['tokens_per_s']:.1f} tokens a second" in out
    seconds = plan.decode_seconds(plan_items("deepseek-v3"), {"cpu": 250.0, "cuda": 1008.0})
    assert v3["tokens_per_s"] == pytest.approx(1 / seconds) and v3["fits"] == {"cuda:0": True, "cpu": True}


def plan_items(name, context=8192):
    found = memory.Inventory.builtin(name)
    return memory.items(found, plan.placement.experts_on_cpu, context)


def test_what_does_not_fit_is_told_with_what_would(capsys):
    need = memory.totals(plan_items("deepseek-v3"))["cuda:0"] + memory.CONTEXT_BYTES
    for gb, fits in ((need / 1e9 + 1e-6, "Yes"), (need / 1e9 - 1e-6, "No")):  # the driver's part counts
        out = answer(capsys, "--config", "deepseek-v3", "--vram", f"{gb:.9f}", "--ram", "512")
        assert out.startswith(fits), gb
    assert "--context 4096" in out
    small = answer(capsys, "--config", "deepseek-v3", "--vram", "2", "--ram", "100")
    assert small.count("too little") == 2 and "No shorter conversation" in small and "disk" in small
    alone = answer(capsys, "--config", "deepseek-v3", "--vram", "0", "--ram", "512")
    assert alone.startswith("Yes") and "GPU" not in alone
    given = answer(capsys, "--config", "deepseek-v3", "--vram", "0", "--ram", "512", "--cpu_gbps", "77")
    assert "RAM of 77 GB/s is given" in given


@pytest.mark.parametrize("name", [*memory.builtin_configs(), *memory.ALIKE, "DeepSeek-R1"])
def test_every_name_of_a_model_works(name, capsys):
    assert "tokens a second" in answer(capsys, "--config", name, "--vram", "24", "--ram", "1000")


def test_the_weights_may_lie_elsewhere(hybrid_folder, capsys, tmp_path):
    here = answer(capsys, "--model_path", str(hybrid_folder), "--vram", "1", "--ram", "1", "--json")
    bare = tmp_path / "weights"
    bare.mkdir()
    for file in hybrid_folder.iterdir():
        if file.name != "config.json":
            (bare / file.name).symlink_to(file)
    flags = [
        "--model_path",
        str(hybrid_folder),
        "--gguf_path",
        str(bare),
        "--vram",
        "1",
        "--ram",
        "1",
        "--json",
    ]
    there, here = json.loads(answer(capsys, *flags)), json.loads(here)
    assert there["parts"] == here["parts"]
    alone = json.loads(answer(capsys, "--gguf_path", str(hybrid_folder), "--vram=1", "--ram=1", "--json"))
    assert alone["parts"] == here["parts"]
    with pytest.raises(RefimplError, match="config"):
        plan.main(["--gguf_path", str(bare), "--vram", "1", "--ram", "1"])
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--config", "deepseek-v3", "--gguf_path", str(bare)])
