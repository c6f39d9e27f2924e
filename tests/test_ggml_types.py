"""Files with experts of any type that a GGUF may name, ik_llama.cpp's own too: all that asks for sizes and
names alone lists them; what asks for their numbers says the type in one line.
"""

import math

import numpy as np
import pytest

import refimpl
from refimpl import diff, inspect, plan
from refimpl.checkpoint import gguf
from refimpl.cli import run
from refimpl.errors import UnsupportedError
from refimpl.formats.ggml_types import FORK, TYPES
from refimpl.tiny import GGUF_FILE

NUMBERS = {t.name: number for number, t in TYPES.items()}


def with_experts(path, number):
    """The embedded model's GGUF with routed experts of zero bytes in that type. -> bytes of a stack."""
    file, kind, entries, nbytes = gguf.read(GGUF_FILE), TYPES[number], [], 0
    for name, info in file.tensors.items():
        data = np.fromfile(info.path, np.uint8, info.nbytes, offset=info.offset).tobytes()
        stored = NUMBERS[info.dtype]
        if "_exps" in name:
            rows, columns = math.prod(info.shape[:-1]), info.shape[-1]
            data = bytes(rows * (kind.row_head + columns // kind.weights * kind.nbytes))
            stored, nbytes = number, len(data)
        entries.append(gguf.Entry(name, stored, info.shape, lambda data=data: [data]))
    gguf.write(path, file.metadata, entries)
    return nbytes


# Of ggml and of its fork, with a head of a row or without, plain, rows interleaved, numbers.
SHOWN = ("F64", "I8", "IQ2_XXS", "IQ1_M", "Q4_0_4_4", "IQ4_KS", "IQ2_K", "Q8_KV", "Q4_K_R4", "IQ4_KS_R4")


@pytest.mark.parametrize("number", [NUMBERS[name] for name in SHOWN], ids=SHOWN)
def test_inspect_diff_and_plan_list_experts_of_every_type_by_name(number, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    nbytes = with_experts(path, number)
    assert gguf.read(path).tensors["blk.1.ffn_up_exps.weight"].nbytes == nbytes
    for command, args in (
        (inspect, [path]),
        (diff, [path, path]),
        (plan, ["--model_path", path, "--cpu_gbps", 10, "--gpu_gbps", 100]),
    ):
        code = run(command.main, list(map(str, args)))
        shown = capsys.readouterr().out
        assert code == 0 and TYPES[number].name in shown, command.__name__


@pytest.mark.parametrize("number", [16, 144, 212], ids=lambda n: TYPES[n].name)
def test_what_needs_their_numbers_names_the_type(number, tmp_path):
    with_experts(tmp_path / "m.gguf", number)
    whose = "ik_llama.cpp" if number >= FORK else "supported"
    with pytest.raises(UnsupportedError, match=f"E1301 .*{TYPES[number].name}.*{whose}|E1301 .*{whose}"):
        refimpl.load(tmp_path / "m.gguf", backend="reference")
