"""The two compiled extensions, and the mapping of the folder `kernels/` to the package `refimpl.kernels`. All
else is in pyproject.toml.
"""

import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# No fused multiply-add: a codec has the bits of its reference, NaN and infinity included.
FLAGS = ["-O3", "-ffp-contract=off"]
# else gcc unrolls loops over groups of 16 before it looks for vectors in them
PEEL = "--param=max-completely-peel-times=8"
OPENMP = "-fopenmp"


class OptionalBuild(build_ext):
    """A machine without a C compiler installs all the same: every compiled function has its numpy
    reference.
    """

    def run(self):
        try:
            super().run()
        except Exception as error:  # whatever a missing or broken compiler raises
            self._note(error)

    def build_extension(self, ext):
        if self.compiler.compiler_type != "msvc" and ext.name.endswith("codec"):
            threads = (
                [OPENMP]
                if self._accepts(
                    OPENMP, "#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n"
                )
                else []
            )
            peel = [PEEL] if self._accepts(PEEL, "int nothing(void) { return 0; }\n") else []
            ext.extra_compile_args, ext.extra_link_args = FLAGS + peel + threads, threads
        try:
            super().build_extension(ext)
        except Exception as error:
            self._note(error)

    def copy_extensions_to_source(self):
        try:
            super().copy_extensions_to_source()
        except FileNotFoundError as error:
            self._note(error)

    def _accepts(self, flag, code):
        """Whether compiler and linker do, on a few lines of C. Apple's have no OpenMP: the codecs run in one
        thread then.
        """
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.c")
            source.write_text(code)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "trial.so")), extra_postargs=[flag]
                )
            except Exception:
                return False
        return True

    def _note(self, error):
        print(
            f"refimpl: note: an extension was not built ({error}); numpy's references stand for the codecs, "
            f"and a mapped file that is cut short ends the process",
            file=sys.stderr,
        )


setup(
    packages=[*find_packages(include=["refimpl", "refimpl.*"]), "refimpl.kernels"],
    package_dir={"refimpl.kernels": "kernels"},
    package_data={
        "refimpl": ["py.typed", "errors.toml", "vanished.pyx", "rules_yaml/*.yaml", "configs/*.json"],
        "refimpl.conformance": ["*.toml"],
        "refimpl.server": ["page/*"],
        "refimpl.tiny": ["fp8/*", "gguf/*"],
        "refimpl.pages": ["*.js", "*.css", "*.html"],
        "refimpl.kernels": ["*.pyx", "*.pxi", "*.md"],
    },
    ext_modules=[
        Extension(
            "refimpl.kernels.ggml_codec",
            ["kernels/ggml_codec.pyx"],
            depends=[str(p) for p in Path("kernels").glob("*.pxi")],
        ),
        *([] if sys.platform == "win32" else [Extension("refimpl.vanished", ["refimpl/vanished.pyx"])]),
    ],
    cmdclass={"build_ext": OptionalBuild},
)
