"""The one compiled extension, and the mapping of the folder `kernels/` to the package `refimpl.kernels`. All else is in pyproject.toml."""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No fused multiply-add: a codec has the bits of its reference, NaN and infinity included.
FLAGS = ["-O3", "-ffp-contract=off"]


class OptionalBuild(build_ext):
    """A machine without a C compiler installs all the same: every compiled function has its numpy reference."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # whatever a missing or broken compiler raises
            self._note(error)

    def build_extension(self, ext):
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args = FLAGS
        try:
            super().build_extension(ext)
        except Exception as error:
            self._note(error)

    def copy_extensions_to_source(self):
        try:
            super().copy_extensions_to_source()
        except FileNotFoundError as error:
            self._note(error)

    def _note(self, error):
        print(f"refimpl: note: the Cython codecs were not built ({error}); the numpy references are used instead", file=sys.stderr)


setup(
    packages=["refimpl", "refimpl.formats", "refimpl.tiny", "refimpl.conformance", "refimpl.kernels"],
    package_dir={"refimpl.kernels": "kernels"},
    package_data={"refimpl": ["py.typed"], "refimpl.tiny": ["fp8/*", "gguf/*"], "refimpl.kernels": ["*.pyx", "*.md"]},
    ext_modules=[Extension("refimpl.kernels.ggml_codec", ["kernels/ggml_codec.pyx"])],
    cmdclass={"build_ext": OptionalBuild},
)
