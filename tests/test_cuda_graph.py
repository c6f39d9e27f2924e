"""What `CudaGraph` records and replays, on CPU tensors: a stand-in for torch's graphs writes down every
operation while it captures instead of computing it, and computes it at each replay, into the tensors of the
capture. So a
value that was taken while capturing, a tensor that nobody keeps up to date, or a call of the host that is not
between two graphs shows in the logits. test_gpu.py has the real ones.
"""

import re

import numpy as np
import pytest

import refimpl
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.devices.placement import experts_on_cpu
from refimpl.model import Model

torch = pytest.importorskip("torch", reason="the cuda backend is torch's: the extra `gpu`")
oracle = pytest.importorskip("tests.oracle_hf", reason="needs torch and transformers: the extra `test`")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from refimpl.devices import cuda, cuda_graph  # noqa: E402
from refimpl.kernels import attention_torch, linear_torch  # noqa: E402


class Recorder(TorchDispatchMode):
    """Operations that would be launched, written down. Their outputs are NaN until a replay."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "is_nonzero"):
            raise AssertionError("the host asks for a value while a graph is captured")
        if any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments):
            self.calls.append((function, args, kwargs, None))
            return args[0]
        out = function(*args, **kwargs)
        views = any(r.alias_info is not None for r in function._schema.returns)
        if not views and not name.startswith(("empty", "new_empty")):
            self.calls.append((function, args, kwargs, out))
            for tensor in tensors(out):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        return out


def tensors(out):
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor)]


class Graph:
    """As torch.cuda.CUDAGraph."""

    capturing = 0

    def capture_begin(self, pool, capture_error_mode):
        assert not Graph.capturing and capture_error_mode == "thread_local"
        Graph.capturing += 1
        self.calls = []
        self.mode = Recorder(self.calls)
        self.mode.__enter__()

    def capture_end(self):
        Graph.capturing -= 1
        self.mode.__exit__(None, None, None)

    def replay(self):
        assert not Graph.capturing
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for mine, new in zip(tensors(out), tensors(again)):
                mine.copy_(new)


class Stream:
    """As torch.cuda.Stream, and as the context that chooses it."""

    def __init__(self, *args):
        pass

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture(autouse=True)
def on_cpu_tensors(monkeypatch):
    """Torch's products, which a graph can hold, in place of numpy's; and graphs that are recorded."""
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    for module in (linear_torch, attention_torch):
        monkeypatch.setattr(module, "product", lambda x, w: torch.matmul(x.float(), w.float()))
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    cuda_graph._stream.cache_clear()
    yield
    cuda_graph._stream.cache_clear()


def both(model, place=experts_on_cpu):
    """The model with graphs, and without."""
    found = []
    for graphs in (True, False):
        backend = cuda.CudaBackend(place, model.backend.activations)
        backend.graphs = graphs
        found.append(Model(model.config, model.checkpoint, backend))
    return found


def decode(graphs, eager, start=240, end=262):
    """Prefill and decode with both, over the border where the cache grows; then go back, then start anew."""
    vocabulary = graphs.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, end).tolist()
    for _ in range(2):
        one, other = graphs.new_cache(), eager.new_cache()
        graphs.forward(ids[:start], one), eager.forward(ids[:start], other)
        for i in range(start, end):
            found, true = graphs.forward([ids[i]], one), eager.forward([ids[i]], other)
            np.testing.assert_array_equal(found, true)
        one.truncate(start // 2), other.truncate(start // 2)
        np.testing.assert_array_equal(graphs.forward([5], one), eager.forward([5], other))
        assert one.length == other.length == start // 2 + 1


@pytest.mark.parametrize("activations", ["fp8", "exact"])
def test_graphs_give_the_same_bits_and_survive_growth(hybrid_folder, activations):
    base = refimpl.load(hybrid_folder, backend="reference", activations=activations)
    graphs, eager = both(base)
    decode(graphs, eager)
    captured = graphs.decoder.function
    assert isinstance(captured, cuda_graph.CudaGraph) and not isinstance(
        eager.decoder.function, type(captured)
    )
    # One graph begins a token; another comes behind the launch of a layer's experts, and behind their result.
    sparse = sum(not base.config.is_dense(i) for i in range(base.config.num_hidden_layers))
    replays = [step for step in captured.steps if isinstance(getattr(step, "__self__", None), Graph)]
    assert len(replays) == 1 + 2 * sparse and len(captured.steps) == 1 + 4 * sparse
    assert all(step.__self__.calls for step in replays)


def small(**overrides):
    raw = oracle.SMALL | overrides
    return Model(
        DeepSeekConfig.from_dict(raw), oracle.random_checkpoint(raw, 0), CpuBackend("reference", "exact")
    )


def test_without_a_shared_expert_the_result_is_waited_for_all_the_same():
    graphs, eager = both(small(n_shared_experts=0))
    decode(graphs, eager, 3, 9)


@pytest.mark.parametrize(
    "on_cpu", [r"(q_b|o)_proj", r"shared_experts\.down_proj", "lm_head", r"mlp\.gate_proj"]
)
def test_a_matrix_left_to_the_cpu_is_between_two_graphs(on_cpu):
    def place(module):
        return "cpu" if re.search(on_cpu, module) or experts_on_cpu(module) == "cpu" else "cuda:0"

    model = small()
    counts = []
    for graphs, eager in (both(model, place), both(model)):
        decode(graphs, eager, 3, 9)
        counts.append(len(graphs.decoder.function.steps))
    assert counts[0] > counts[1]


def test_with_layers_on_the_cpu_each_of_the_others_is_captured():
    def place(module):
        return "cpu" if ".layers.1." in module or experts_on_cpu(module) == "cpu" else "cuda:0"

    graphs, eager = both(small(), place)
    decode(graphs, eager, 3, 9)
    decoder = graphs.decoder.function
    kinds = [isinstance(layer.function, cuda_graph.CudaGraph) for layer in decoder.layers]
    assert kinds == [i != 1 for i in range(len(kinds))] and isinstance(
        decoder.head.function, cuda_graph.CudaGraph
    )


def test_a_capture_that_fails_is_tried_again(monkeypatch):
    graphs, eager = both(small())
    one, other = graphs.new_cache(), eager.new_cache()
    graphs.forward([1, 2, 3], one), eager.forward([1, 2, 3], other)
    begin = Graph.capture_begin

    def failing(self, **arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Graph, "capture_begin", failing)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.forward([4], one)
    monkeypatch.setattr(Graph, "capture_begin", begin)
    assert one.length == 3 and graphs.decoder.function.key is None
    for token in (4, 5, 6):
        np.testing.assert_array_equal(graphs.forward([token], one), eager.forward([token], other))
