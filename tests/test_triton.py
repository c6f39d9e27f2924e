"""The Triton kernels, without a GPU and with one; each way in a process of its own, see triton_cases.py,
triton_decode_cases.py and triton_compiled.py.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl import ops

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="Triton is not installed (extra `test`, Linux only)",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="torch is not installed (extra `test`)"
    ),
]


def run(file: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)]
    env = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")
    } | environment
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


CASES = pytest.mark.parametrize("file", ["triton_cases.py", "triton_decode_cases.py"])


@CASES
def test_kernels_under_the_interpreter(file):
    run(file, TRITON_INTERPRET="1")


OTHERS = [pytest.param(c, marks=pytest.mark.chips) for c in ("80", "89", "100", "120")]


@pytest.mark.parametrize("capability", ["90", *OTHERS])
def test_kernels_compile_for(capability):
    run("triton_compiled.py", REFIMPL_CAPABILITY=capability)


@CASES
def test_kernels_on_this_gpu(file):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here; what runs without one is tested above")
    run(file)


def test_rows_of_the_table():
    rows = {name: op.fast["cuda"] for name, op in ops.OPS.items() if "triton" in op.fast.get("cuda", "")}
    assert {"fp8.act_quant", "fp8.weight_dequant", "fp8.linear"} <= set(rows)
    assert (
        ops.OPS["fp8.act_quant"].equal == ops.OPS["fp8.weight_dequant"].equal == "bits"
        and ops.OPS["fp8.linear"].equal == "bound"
    )
    for path in rows.values():
        module, function = path.split(":")
        assert f"def {function}(" in (
            HERE.parent / module.replace("refimpl.kernels.", "kernels/")
        ).with_suffix(".py").read_text("utf-8")
