"""A step debugger for inference: every operation of a pass, in order, with its values; and where two models
part.

    for step in refimpl.trace(model, "What is 7 + 8?"):
        print(step)                                         # one line; step.inputs and step.output are the
        arrays themselves
    refimpl.trace(model, "What is 7 + 8?").to_html("walk.html")           # a page to step through

The model runs in a thread that stands still at every operation until the next step is asked for, so a pass of
any size holds one step in memory. A model that is not traced knows nothing of this module: a traced one is a
second `Model` over the same weights, on a backend that is watched.
"""

from __future__ import annotations

import inspect
import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import formats, ops
from refimpl.cli import size
from refimpl.files import check_writable, write_text
from refimpl.model import Model
from refimpl.pages import walk
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, as_numpy
from refimpl.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Step:
    """One operation as it ran. `inputs` has its arguments by their names in the reference, `output` what it
    returned; neither is a copy.
    """

    index: int
    # of the pass's first token in its sequence: 0 in the first pass, later when the cache is being decoded
    # into
    position: int
    module: str  # "model.layers.3.self_attn"
    name: str  # the row of ops.OPS, "linear"
    backend: str  # "reference", or the column of OPS that the function stands in
    inputs: Mapping[str, Any]
    output: Any
    weights: Mapping[str, str]  # which inputs are weights, and what the module calls them: {"w": "q_a_proj"}
    call: Callable = field(repr=False)  # takes the values of `inputs`, in order

    @property
    def tensors(self) -> dict[str, Any]:
        """Inputs and outputs that have a shape, by name; the output is "out", several are "out[0]",
        "out[1]".
        """
        outputs = (
            {f"out[{i}]": o for i, o in enumerate(self.output)}
            if type(self.output) is tuple
            else {"out": self.output}
        )
        return {
            name: value
            for name, value in (dict(self.inputs) | outputs).items()
            if hasattr(value, "__len__") and not isinstance(value, str)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor among these values, in order."""
        return {
            name: tuple(value.shape) if hasattr(value, "shape") else (len(value),)
            for name, value in self.tensors.items()
        }

    @property
    def dtypes(self) -> dict[str, str]:
        """Type of every tensor: "f32", "E4M3", "Q4_K", ..."""
        return {name: dtype_name(value) for name, value in self.tensors.items()}

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that the operation has to read: of a stack the chosen experts, of the embedding
        table the rows of the tokens.
        """
        return sum(int(nbytes(self.inputs[name]) * self._share(name)) for name in self.weights)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all other inputs and of the output."""
        return sum(nbytes(value) for name, value in self.tensors.items() if name not in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes touched at the least: everything read once, the output written once."""
        return self.weight_bytes + self.activation_bytes

    @property
    def label(self) -> str:
        """The operation and the weights it meets: "linear q_a_proj"."""
        return " ".join((self.name, *self.weights.values()))

    def _share(self, name: str) -> float:
        if self.name not in ("experts", "embed"):
            return 1.0
        ids, stack = as_numpy(self.inputs["ids"]), self.inputs[name]
        return (len(np.unique(ids)) if self.name == "experts" else ids.size) / len(
            stack if not isinstance(stack, Packed | Interleaved) else stack.data
        )

    def __str__(self) -> str:
        shown = {
            name: f"{self.dtypes[name]}[{','.join(map(str, shape))}]" for name, shape in self.shapes.items()
        }
        left = [text for name, text in shown.items() if not name.startswith("out")]
        right = [text for name, text in shown.items() if name.startswith("out")]
        return (
            f"{self.index:4} {self.module:33} {self.label:37} {self.backend:9} {size(self.nbytes):>9}  "
            f"{' '.join(left)} -> {' '.join(right)}"
        )


class Trace(Iterator[Step]):
    """The steps of a pass, which runs while they are asked for; `to_html` writes them as a page instead."""

    def __init__(self, steps: Generator[Step], ids: Sequence[int], spell: Callable[[int], str]):
        self._steps, self._ids, self._spell, self._begun = steps, ids, spell, False

    def __next__(self) -> Step:
        self._begun = True
        return next(self._steps)

    def close(self) -> None:
        """End the pass where it stands."""
        self._steps.close()

    def to_html(self, path: str | os.PathLike, *, force: bool = False) -> None:
        """Run the pass and write it as one page that needs nothing else: every step with shapes and bytes,
        attention maps, experts chosen, the logit lens. `force` replaces a file that is there.

        ValueError when steps were taken already, or for a longer prompt than a page holds; ResourceError as
        `files.check_writable`.
        """
        if self._begun:
            raise ValueError("steps of this trace were taken already: call refimpl.trace anew")
        check_writable(Path(path), force=force)
        write_text(Path(path), walk.page(walk.data(self, self._ids, self._spell)), force=force)


def trace(model: Model, prompt: str | Sequence[int], decode: int | None = None) -> Trace:
    """Yield every operation of one pass over `prompt`, text (plain, no chat template) or token ids.

    decode=None: `model.logits`, no cache, naive attention. decode=n: with a new latent cache and absorbed
    attention; the last n tokens of the prompt are decoded one by one after the others were prefilled. The
    pass goes on only while steps are asked for; what else `logits` raises is raised here.
    """
    ids = token_ids(model, prompt)
    if decode is not None and not 0 <= decode <= len(ids):
        raise ValueError(f"cannot decode {decode} of {len(ids)} tokens")
    return Trace(_stepwise(partial(_run, model, ids, decode)), ids, _speller(model))


def token_ids(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """The prompt as ids; text goes through the tokenizer beside the model's weights."""
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    if not hasattr(model.checkpoint, "folder"):
        raise ValueError("this model has no folder and so no tokenizer: give token ids")
    return Tokenizer(model.checkpoint.folder).encode(prompt)


def _speller(model: Model) -> Callable[[int], str]:
    """How a token is written: by the tokenizer beside the model's weights, else as its number. The
    tokenizer is opened when the first token is asked for.
    """
    if not hasattr(model.checkpoint, "folder"):
        return str
    tokenizer = cache(lambda: Tokenizer(model.checkpoint.folder))  # type: ignore[attr-defined]
    return lambda token: tokenizer().decode([token])


def _run(model: Model, ids: list[int], decode: int | None, report: Callable[[Step], None]) -> None:
    watcher = _Watcher(model.backend.name, report)
    traced = Model(model.config, model.checkpoint, model.backend.watched(watcher))
    if decode is None:
        traced.logits(ids)
        return
    cache, first = traced.new_cache(), len(ids) - decode
    for start, end in ((0, first), *((i, i + 1) for i in range(first, len(ids)))):
        if end > start:
            watcher.position = start
            traced.forward(ids[start:end], cache)


# What modules call two of their weights; all others go by the last word of their names.
_SPOKEN = {"kv_b_proj": "kv_b", "e_score_correction_bias": "bias"}


class _Watcher:
    """Makes every operation that a backend gives out report itself after it ran, with the names of the
    weights it met.
    """

    def __init__(self, backend: str, report: Callable[[Step], None]):
        self.backend, self.report, self.index, self.position = backend, report, 0, 0
        self.names: dict[int, str] = {}  # of weights, by id: the model holds them

    def weight(self, name: str, value: Any) -> None:
        """Learn what a weight is called."""
        word = name.removesuffix(".weight").rpartition(".")[2]
        self.names[id(value)] = _SPOKEN.get(word, word)

    def operation(self, module: str, name: str, function: Callable) -> Callable:
        """The backend's operation, wrapped so that each call is reported to the watcher."""
        inner, fixed = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
        signature, column = inspect.signature(ops.OPS[name].reference), _column(name, inner, self.backend)

        def reporting(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            inputs = signature.bind(*args, **kwargs, **fixed).arguments
            while inputs and next(reversed(inputs.values())) is None:  # nothing that it was given
                inputs.popitem()
            weights = {k: self.names[id(value)] for k, value in inputs.items() if id(value) in self.names}
            self.report(Step(self.index, self.position, module, name, column, inputs, output, weights, inner))
            self.index += 1
            return output

        return reporting


def _column(name: str, function: Callable, backend: str) -> str:
    """Where in OPS a function stands."""
    if function is ops.OPS[name].reference:
        return "reference"
    target = f"{getattr(function, '__module__', '')}:{getattr(function, '__name__', '')}"
    return next((column for column, path in ops.OPS[name].fast.items() if path == target), backend)


class _Abandoned(BaseException):
    """Raised inside the pass when nobody wants its next step."""


def _stepwise(run: Callable[[Callable[[Step], None]], None]) -> Generator[Step]:
    """Yield what `run(report)` reports; `run` works only between two requests, in a thread of its own, and is
    abandoned with this generator.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()

    def wait() -> None:
        if not wanted.get():
            raise _Abandoned

    def report(step: Step) -> None:
        results.put(step)
        wait()

    def body() -> None:
        try:
            wait()
            run(report)
            results.put(None)
        except _Abandoned:
            pass
        except BaseException as error:
            results.put(error)

    thread = threading.Thread(target=body, name="refimpl.trace", daemon=True)
    thread.start()
    try:
        while True:
            wanted.put(True)
            result = results.get()
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        wanted.put(False)
        thread.join()


# --- values -------------------------------------------------------------------------------------------------


def dtype_name(value: Any) -> str:
    """ "f32", "i64", "b16" (torch's bfloat16), ...; "E4M3" for scaled FP8, "INT4", ggml's name for packed
    blocks, the first one's for a list of experts.
    """
    if isinstance(value, ScaledFP8):
        return "E4M3"
    if isinstance(value, ScaledInt4):
        return "INT4"
    if isinstance(value, Packed | Interleaved):
        return formats.type_name(value.ggml_type)
    if isinstance(value, np.ndarray):
        return f"{value.dtype.kind}{8 * value.dtype.itemsize}"
    if hasattr(value, "dtype"):
        kind = re.fullmatch(r"torch\.([a-z])[a-z]*?(\d+)", str(value.dtype))
        return str(value.dtype) if kind is None else kind[1] + kind[2]
    return dtype_name(value[0])


def nbytes(value: Any) -> int:
    """Bytes of a tensor of any kind; experts that lie one by one are counted as the first times their
    number.
    """
    if isinstance(value, ScaledFP8 | ScaledInt4):
        return nbytes(value.codes) + nbytes(value.scale)
    if isinstance(value, Packed | Interleaved):
        return nbytes(value.data)
    return int(value.nbytes) if hasattr(value, "nbytes") else len(value) * nbytes(value[0])


def output_array(step: Step) -> np.ndarray:
    """A step's output as one f64 array; routing (ids and weights [T, A]) as the weight of every expert [T,
    E], 0 for the others.
    """
    if step.name != "route":
        return as_numpy(step.output).astype(np.float64)
    ids, weights = map(as_numpy, step.output)
    dense = np.zeros((len(ids), len(step.inputs["bias"])))
    np.put_along_axis(dense, ids, weights.astype(np.float64), axis=-1)
    return dense


# --- two models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Difference:
    """One operation of two models. All errors are relative to the root mean square of the first model's
    output.
    """

    a: Step
    b: Step
    rms: float  # root mean square of b - a: what has come together up to here
    worst: float  # of the element that differs most: a column that is wrong cannot hide in a mean
    own_rms: float  # the same two when b's operation is given a's inputs: what this operation adds
    own_worst: float

    def __str__(self) -> str:
        return (
            f"{self.a.index:4} {self.a.module:33} {self.a.label:37} {self.rms:9.2e} {self.worst:9.2e} "
            f"{self.own_rms:9.2e} {self.own_worst:9.2e}"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The error profile of two models, one `Difference` an operation, and the bound they were held to."""

    steps: tuple[Difference, ...]
    bound: float

    @property
    def first(self) -> Difference | None:
        """The first operation with an element beyond the bound (or NaN in one model alone); None when there
        is none.
        """
        return next((d for d in self.steps if not d.worst <= self.bound), None)

    @property
    def cause(self) -> Difference | None:
        """The first operation that exceeds the bound by itself, on equal inputs.

        `first` without `cause` is a difference that grew: an activation close to the middle of two FP8 codes
        was rounded to the other one.
        """
        return next((d for d in self.steps if not d.own_worst <= self.bound), None)

    def __str__(self) -> str:
        """The profile: one line an operation, then which one parts them."""
        head = (
            f"{'':4} {'module':33} {'operation':37} {'rms':>9} {'worst':>9} {'own rms':>9} {'own worst':>9}"
        )
        told = (
            f"first beyond {self.bound:g}: "
            f"{'none' if d is None else f'{d.a.index} {d.a.module} {d.a.label}'}{of}"
            for d, of in ((self.first, ""), (self.cause, ", on equal inputs"))
        )
        return "\n".join((head, *map(str, self.steps), *told))


def compare(
    a: Model,
    b: Model,
    prompt: str | Sequence[int],
    bound: float = 0.01,
    decode: int | None = None,
    stop: bool = False,
) -> Comparison:
    """Walk two models through the same prompt side by side: two backends, two quantizations, two folders.

    `prompt` and `decode` as in `trace`; text is encoded once, with a's tokenizer. An operation parts them
    when one element of its output differs by more than `bound` times the root mean square of a's output.
    stop=True ends the walk there, else it goes on to the end. ValueError when the two do not run the same
    operations.
    """
    ids, found = token_ids(a, prompt), []
    walks = trace(a, ids, decode), trace(b, ids, decode)
    try:
        for one, other in zip(*walks, strict=True):
            found.append(_difference(one, other))
            if stop and not found[-1].worst <= bound:
                break
    finally:
        for side in walks:
            side.close()
    return Comparison(tuple(found), bound)


def _difference(a: Step, b: Step) -> Difference:
    if (a.module, a.name) != (b.module, b.name):
        raise ValueError(f"the models differ: {a.module} {a.name} against {b.module} {b.name}")
    true = output_array(a)
    rms, worst = errors(true, output_array(b))
    swapped = [
        value if name in b.weights else _like(a.inputs.get(name), value) for name, value in b.inputs.items()
    ]
    again = replace(b, output=b.call(*swapped))
    return Difference(a, b, rms, worst, *errors(true, output_array(again)))


def _like(value: Any, other: Any) -> Any:
    """`value` as the kind of thing that `other` is: a numpy array, or a torch tensor on its device."""
    if value is None or isinstance(other, np.ndarray):
        return value if value is None else as_numpy(value)
    return other.new_tensor(as_numpy(value)) if hasattr(other, "new_tensor") else other


def errors(true: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Root mean square and largest magnitude of other - true, relative to true's root mean square (infinite
    where only one of them is NaN).
    """
    if true.shape != other.shape:
        raise ValueError(f"the models differ: an output of shape {true.shape} against {other.shape}")
    same = (true == other) | (np.isnan(true) & np.isnan(other))
    difference = np.where(same, 0.0, np.nan_to_num(np.abs(other - true), nan=np.inf))
    scale = float(np.sqrt(np.mean(np.square(np.nan_to_num(true, posinf=0, neginf=0))))) if true.size else 0.0
    if not difference.any():
        return 0.0, 0.0
    scale = scale or 1.0  # against an output of zeros errors are absolute
    return float(np.sqrt(np.mean(np.square(difference))) / scale), float(difference.max() / scale)
