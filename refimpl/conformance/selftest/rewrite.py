"""What a rewrite is: a kernel that is right, written otherwise, which the suite must accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refimpl.conformance.manifest import Manifest
from refimpl.conformance.trial import Trial

F32, F64 = np.float32, np.float64
Array = np.ndarray
Kernel = Callable[..., Any]


class Rewrite(NamedTuple):
    """A kernel that is right, written otherwise."""

    name: str
    op: str
    kernel: Kernel
    declared: dict[str, Any] = {}  # noqa: RUF012
    brief: bool = True  # one real size of each kind of weight is enough

    def trial(self) -> Trial:
        """To be judged under the project's own promises."""
        manifest = Manifest().with_values(self.declared, self.name)
        return Trial(self.op, self.kernel, manifest, self.name, brief=self.brief)
