"""Everything is declared in pyproject.toml; this file says what only code can: how csrc/ becomes a library.

It needs a GCC or Clang; where there is none the installation goes on without it, and the native backend says so.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

SUFFIX = ".dll" if os.name == "nt" else ".so"
COMPILE = [
    *("-O2", "-std=c++17", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables"),
    *("-fno-math-errno", "-ffp-contract=off"),  # products are fused where the source says so, and only there
]
LINK = ["-pthread"] if sys.platform == "darwin" else ["-pthread", "-Wl,--as-needed", "-Wl,-s"]
# What the files of instruction sets need beyond that. All others must run on any machine that the wheel may go to.
INSTRUCTIONS = {
    "csrc/avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512vl"],
    "csrc/int8_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/int8_avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}
if sys.platform == "darwin":  # one build may be for both processors
    INSTRUCTIONS = {
        file: [f for flag in flags for f in ("-Xarch_x86_64", flag)] for file, flags in INSTRUCTIONS.items()
    }
elif platform.machine().lower() not in ("x86_64", "amd64"):
    INSTRUCTIONS = {}


class BuildLibrary(build_ext):
    """A plain shared library for ctypes and C: no Python.h, no PyInit_, no interpreter's tag in its name."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + SUFFIX

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def get_libraries(self, ext):
        return ext.libraries

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            raise PlatformError("the native backend needs GCC or Clang, whose vector types it is written in")
        options = {"output_dir": self.build_temp, "depends": ext.depends, "debug": self.debug}
        for source, flags in INSTRUCTIONS.items():
            ext.extra_objects += self.compiler.compile([source], extra_postargs=COMPILE + flags, **options)
        super().build_extension(ext)


class AnyPython(bdist_wheel):
    """A wheel for any Python, of this platform if it holds the library."""

    def get_tag(self):
        built = os.path.exists(os.path.join(self.bdist_dir, "fastlstm", "_native" + SUFFIX))
        return "py3", "none", super().get_tag()[2] if built else "any"


def posix(pattern):
    return sorted(path.as_posix() for path in Path("csrc").glob(pattern))


library = Extension(
    "fastlstm._native",
    [path for path in posix("*.cpp") if path not in INSTRUCTIONS],
    depends=[*posix("*.h"), *INSTRUCTIONS],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    language="c++",
    optional=True,
)
setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
