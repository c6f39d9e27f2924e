"""A kernel on trial: a function, the operation it claims to be, and what it declares."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from refimpl import ops
from refimpl.conformance.families.by_name import family
from refimpl.conformance.families.family import Family, Recipe
from refimpl.conformance.inputs import arrays, cached
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth.bounds import says_nothing
from refimpl.conformance.truth.compare import Mismatch

MODES = {
    "linear",
    "fp8.linear",
    "fp8.bf16.linear",
    "interleaved.linear",
    "swiglu",
    "experts",
    "interleaved.experts",
}
"""Operations whose last argument is `activations`; "fp8" is its default and is not passed."""


WEIGHTS = {
    "embed": (0,),
    "linear": (1,),
    "fp8.linear": (1,),
    "fp8.bf16.linear": (1,),
    "interleaved.linear": (1,),
    "swiglu": (1, 2, 3),
    "experts": (3, 4, 5),
    "interleaved.experts": (3, 4, 5),
    "mla_naive": (4,),
    "mla_absorbed": (4,),
    "route": (1,),
}
"""Which arguments are weights, for `Manifest.prepare`."""


class KernelRaised(Exception):
    """What a kernel raised, where it should have given a result."""


class KernelEnded(KernelRaised):
    """A kernel that would have ended the process, where it should have given a result."""


@dataclass
class Trial:
    """Call it with numpy arguments: it converts, calls, and converts back."""

    op: str
    kernel: Callable[..., Any]
    manifest: Manifest = Manifest()  # noqa: RUF009
    label: str = ""
    level: str = "quick"
    brief: bool = False  # one real size of each kind of weight is enough: it is right, or slow
    isolated: bool = False  # in a process of its own, which it may crash
    silent: int = 0  # how often a bound said nothing so far
    brought: str = ""  # flags that say what a stranger brought beside the kernel
    ways: dict[str, str] = field(default_factory=dict)  # {way: what it needs}, see `ways`
    formed: bool = False  # whether its results are known to have the reference's form

    @cached_property
    def family(self) -> Family:
        """The family that the operation belongs to, found by its name."""
        return family(self.op)

    def build(self, r: Recipe) -> tuple:
        """The arguments of a recipe, always the same."""
        key = self.op, self.manifest, json.dumps(r)
        return cached.arguments(key, lambda: self.family.build(self.op, r, self.manifest))

    def raw(self, *args: Any, **more: Any) -> Any:
        """The kernel itself, on its own kind of array."""
        if self.op in MODES and args[-1] == "fp8":
            args = args[:-1]
        args = self._declared(args)
        try:
            return self.kernel(*args, **more)
        except (SystemExit, MemoryError) as error:
            raise KernelEnded(self._raised(error)) from error
        except Exception as error:
            raise KernelRaised(self._raised(error)) from error

    def _raised(self, error: BaseException) -> str:
        """What the kernel raised, and in which line of its own file, where that is Python."""
        code = getattr(inspect.unwrap(self.kernel), "__code__", None)
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if code is not None and frame.filename == code.co_filename
        ]
        where = f" in line {lines[-1]} of {os.path.basename(code.co_filename)}" if code and lines else ""
        return f"{type(error).__name__}{where}: {error}"

    def _declared(self, args: tuple) -> tuple:
        """Activations in the declared dtype, weights as `prepare` makes them."""
        m = self.manifest
        if m.input != "float32":
            args = (arrays.in_dtype(args[0], m.input), *args[1:])
        if not m.prepare:
            return args
        return tuple(self.prepare(a) if i in WEIGHTS.get(self.op, ()) else a for i, a in enumerate(args))

    @cached_property
    def prepare(self) -> Callable[[Any], Any]:
        """What the manifest names, imported."""
        module, _, function = self.manifest.prepare.partition(":")
        return getattr(importlib.import_module(module), function)

    def __call__(self, *args: Any) -> tuple:
        """Results as a tuple of numpy arrays."""
        return self.numpy(self.raw(*arrays.to_kernel(args, self.manifest)))

    def signature(self) -> str:
        """The reference's parameters, and the first sentence of what it says of them."""
        reference = ops.OPS[self.op].reference
        says = (inspect.getdoc(reference) or "").split("\n\n")[0].replace("\n", " ")
        parameters = str(inspect.signature(reference)).replace("'", "")
        return f"{self.op}{parameters}: {says}"

    def numpy(self, value: Any) -> tuple:
        """Whatever the kernel returned, as a tuple of numpy arrays."""
        return arrays.from_kernel(value, self.manifest.output)

    def judge(self, args: tuple, got: tuple) -> Mismatch | None:
        """What the family demands of these results."""
        return self.judge_each(args, [got])

    def judge_each(self, args: tuple, results: Iterable[tuple]) -> Mismatch | None:
        """What it demands of each of several results of the same arguments, whose truth is looked up once."""
        sums = self.family.sums(self.op, args, self.manifest)
        if any(map(says_nothing, sums)):
            self.silent += 1
        checked = (self.family.check(self.op, args, self.manifest, got, sums) for got in results)
        return next((wrong for wrong in checked if wrong), None)

    def slack(self, args: tuple) -> list[np.ndarray]:
        """How far each result may be from the truth: 0 where bits are demanded."""
        sums = self.family.sums(self.op, args, self.manifest)
        return [s.bound for s in sums] or [np.zeros(1)] * len(self.family.results)

    def takes(self, r: Recipe) -> bool:
        """Whether the kernel declares that it takes this kind of weight, in this mode."""
        return {"kind": r["kind"], "activations": r["activations"]} in self.family.variants(
            self.op, self.manifest
        )

    def takes_parameter(self, name: str) -> bool:
        """Whether the kernel has a parameter of that name."""
        try:
            return name in inspect.signature(self.kernel).parameters
        except (TypeError, ValueError):
            return False

    @staticmethod
    def of_array(array: Any) -> Manifest:
        """What would make arrays like this one."""
        return Manifest(array="torch", device=str(array.device)) if hasattr(array, "detach") else Manifest()


class quiet:
    """No warnings from arithmetic: NaN and overflow are among the inputs."""

    def __enter__(self):
        self.state = np.errstate(all="ignore")
        self.caught = warnings.catch_warnings()
        self.state.__enter__()
        self.caught.__enter__()
        warnings.simplefilter("ignore", RuntimeWarning)

    def __exit__(self, *error: object) -> None:
        self.caught.__exit__(None, None, None)
        self.state.__exit__(None, None, None)
