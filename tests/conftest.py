"""Hypothesis profiles (`dev` by default, `ci` where CI is set, `deep` for `make test-deep`), which tests come
first, and the embedded model merged once a process.
"""

import os
from importlib.util import find_spec

# Before numpy and torch are loaded, for this process and those that tests begin. Where several share the
# cores, threads of BLAS and OpenMP wait for each other by spinning: a model of a few layers takes ten times
# as long. Tests of threads say how many they want.
os.environ.update(
    dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1") | os.environ
)

import pytest
from hypothesis import HealthCheck, settings

from refimpl import convert_model
from refimpl.conformance import interpreter
from refimpl.tiny import FP8_DIR, GGUF_DIR

if os.environ.get("TRITON_INTERPRET"):
    interpreter.quicken()

slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=slow)
settings.register_profile(
    "ci", settings.get_profile("ci"), deadline=None, max_examples=50, suppress_health_check=slow
)
settings.register_profile("deep", deadline=None, max_examples=2000, suppress_health_check=slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


LONG = (
    "tests/test_triton.py::",
    "tests/test_conformance.py::test_rows_in_triton_s_interpreter",
    "tests/test_formats.py::test_a_format_is_added",
)
"""What takes longest. If such a test came last, one process would wait for the other."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session", autouse=True)
def hushed():
    """No word of compiling in this process, which comes at whichever test calls a kernel first."""
    if find_spec("numba"):
        from refimpl.kernels import kept

        kept.hush()


@pytest.fixture(scope="session")
def hybrid_folder(tmp_path_factory):
    """The embedded model's hybrid folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("merged") / "tiny"
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), folder)
    return folder


@pytest.fixture
def refused(capsys):
    """Runs a command that must refuse its input in one line (tests/hostile.py)."""
    from tests.hostile import Refusal

    return Refusal(capsys)


@pytest.fixture
def accepted(capsys):
    """Runs a command that must succeed (tests/hostile.py)."""
    from tests.hostile import Acceptance

    return Acceptance(capsys)
