"""A GGUF that `quantize` wrote, in llama.cpp's memory on two workers that are reached by network.

It needs llama.cpp built with -DGGML_RPC=ON, and its ggml-rpc-server on the PATH. llama-cpp-python takes that
build from LLAMA_CPP_LIB_PATH.
"""

import ctypes
import json
import shutil
import socket
import subprocess
import sys
import time

import pytest

from refimpl import quantize
from refimpl.cli import run
from refimpl.tiny import FP8_DIR
from refimpl.training.tokens import Encoder

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: the extra `peers`")
WORKER = shutil.which("ggml-rpc-server")
pytestmark = pytest.mark.skipif(
    not llama_cpp.llama_supports_rpc() or WORKER is None,
    reason="needs llama.cpp built with -DGGML_RPC=ON, and ggml-rpc-server on the PATH",
)
QUESTIONS = ("What is 123 + 456?", "What is 900 - 77?", "What is 58 + 67?")


@pytest.fixture
def workers():
    """Addresses of two workers on loopback."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, two)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([WORKER, "-H", "127.0.0.1", "-p", str(port)], **quiet) for port in ports]
    try:
        for port in ports:
            _wait_for(port)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in started:
            process.kill()
            process.wait()


def _wait_for(port: int) -> None:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
    raise AssertionError("a worker does not listen")


def _answers(path, workers) -> dict:
    """{"said": ids by question, "devices": how many are workers'}. A process of its own finds them, because
    llama.cpp asks a worker that it knows again for each model.
    """
    command = [sys.executable, "-m", "tests.test_llama_cpp_rpc", str(path), *workers]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "F32"])
def test_two_workers_say_what_one_process_says(workers, tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    arguments = ["--safetensor_path", str(FP8_DIR), "--output", str(path), "--type", kind]
    assert run(quantize.main, arguments) == 0
    alone, shared = _answers(path, []), _answers(path, workers)
    assert (alone["devices"], shared["devices"]) == (0, 2)
    assert alone["said"] == shared["said"]
    encoder = Encoder.open(FP8_DIR)
    assert [encoder.answer(ids) for ids in shared["said"]] == ["579", "823", "125"]


def _register(address: str) -> int:
    """Make a worker's devices known to llama.cpp, as its flag --rpc does; how many there are."""
    ggml = llama_cpp.llama_cpp._lib  # libllama, and what it is linked with
    for name in ("ggml_backend_reg_by_name", "ggml_backend_reg_get_proc_address"):
        getattr(ggml, name).restype = ctypes.c_void_p
    rpc = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"RPC"))
    found = ggml.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    added = ctypes.c_void_p(ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(found)(address.encode()))
    ggml.ggml_backend_register(added)
    ggml.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    return ggml.ggml_backend_reg_dev_count(added)


def _main(path: str, *workers: str) -> None:
    from tests.test_llama_cpp import greedy  # which opens a model's tools: not in the process that collects

    devices = sum(map(_register, workers))
    split = {"n_gpu_layers": -1, "tensor_split": [1] * len(workers)} if workers else {}
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=1, verbose=False, **split)
    encoder = Encoder.open(FP8_DIR)
    said = [greedy(model, encoder.prompt("", [], q), encoder.eos) for q in QUESTIONS]
    model.close()
    print(json.dumps({"said": said, "devices": devices}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
