"""Everything is declared in pyproject.toml; this file says what only code can.

* How csrc/ becomes a library. It needs a GCC or Clang. Where there is none, the installation goes on without it, and
  the native backend says so. A compiler that fails is an error: pip would keep a wheel without the library in its
  cache, and install it again after the compiler has been repaired. FASTLSTM_NATIVE=0 leaves the library out, and with
  FASTLSTM_NATIVE=1 a missing compiler is an error too.
* What a wheel holds. FASTLSTM_MNIST=0, which releases set, leaves out the images of the demonstration: they are 95 % of
  a wheel, and have another licence. A clone and the source distribution have them.
* The version, which stands in fastlstm/version.py alone.
* The page of a package index: README.md, whose links are those of a repository.
"""

import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}
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
    # GCC would load two pointers, which have just been stored apart, as one vector. That takes 5 % of a row's time.
    "csrc/int8_avx2.cpp": ["-mavx2", "-mfma", "-fno-tree-vectorize"],
    "csrc/int8_avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-fno-tree-vectorize"],
}
if sys.platform == "darwin":  # one build may be for both processors
    INSTRUCTIONS = {
        file: [f for flag in flags for f in ("-Xarch_x86_64", flag)] for file, flags in INSTRUCTIONS.items()
    }
elif platform.machine().lower() == "aarch64":
    INSTRUCTIONS = {"csrc/int8_dotprod.cpp": ["-march=armv8.2-a+dotprod"]}


class BuildLibrary(build_ext):
    """A plain shared library for ctypes and C: no Python.h, no PyInit_, no interpreter's tag in its name."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + SUFFIX

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def get_libraries(self, ext):
        return ext.libraries

    def run(self):
        for variable, names in COMPILERS.items():  # where the compiler that Python was built with is not installed
            usual = (sysconfig.get_config_var(variable) or "none").split()[0]
            found = next(filter(shutil.which, (usual, *names)), usual)
            if found != usual and os.name != "nt":
                os.environ.setdefault(variable, found)  # which setuptools reads
        everything = self.extensions
        super().run()
        if self.inplace and not self.extensions:  # left out, and an earlier build may have left it beside the modules
            for extension in everything:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    def build_extensions(self):
        if (reason := self.missing()) is not None:
            if os.environ.get("FASTLSTM_NATIVE") == "1":
                raise PlatformError(f"FASTLSTM_NATIVE=1 is set, and the native backend cannot be built: {reason}")
            self.warn(f"the native backend is left out: {reason}")
            for extension in self.extensions:  # an earlier build may have left it in this folder
                Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            return
        try:
            super().build_extensions()
        except (CompileError, LinkError) as error:
            hint = "with FASTLSTM_NATIVE=0 in the environment fastlstm is installed without its native backend"
            raise type(error)(f"the compiler failed on csrc/ ({error}); {hint}") from error

    def missing(self):
        """Why no library can be built here, or None."""
        if os.environ.get("FASTLSTM_NATIVE") == "0":
            return "FASTLSTM_NATIVE=0 is set"
        if os.name == "nt":
            return "csrc/ does not compile for Windows"
        if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
            return f"csrc/ is for x86-64 and 64-bit ARM, and this machine is {platform.machine()}"
        commands = {self.compiler.compiler_so[0], self.compiler.compiler_cxx[0]}
        absent = sorted(command for command in commands if shutil.which(command) is None)
        none = f"no compiler {' and no '.join(absent)} is installed; CC and CXX in the environment name another"
        return none if absent else None

    def build_extension(self, ext):
        options = {"output_dir": self.build_temp, "depends": ext.depends, "debug": self.debug}
        for source, flags in INSTRUCTIONS.items():
            ext.extra_objects += self.compiler.compile([source], extra_postargs=COMPILE + flags, **options)
        super().build_extension(ext)


class AnyPython(bdist_wheel):
    """A wheel for any Python, and of this platform if it holds the library. On Windows it is of this platform without
    one too, since installers prefer a wheel for any platform to the sources, where the library could be compiled.
    """

    def get_tag(self):
        built = os.path.exists(os.path.join(self.bdist_dir, "fastlstm", "_native" + SUFFIX))
        return "py3", "none", super().get_tag()[2] if built or os.name == "nt" else "any"


class Package(Distribution):
    """The package with the images of MNIST or without them. Without them all of it has one licence."""

    def parse_config_files(self, *args, **options):
        super().parse_config_files(*args, **options)
        if os.environ.get("FASTLSTM_MNIST") == "0":
            self.exclude_package_data["fastlstm.mnist"] = [*self.package_data.pop("fastlstm.mnist"), "README.md"]
            self.metadata.license_expression = "MIT"
            self.metadata.license_files = ["LICENSE"]


def page():
    """README.md with the addresses of its pages and pictures, as they are at this version, in the place of paths."""
    (address,) = re.findall(r'^Repository = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    shown = re.sub(r'(!\[[^\]]*\]\(|src(?:set)?=")(?!https?:)', rf"\1{address}/raw/v{VERSION}/", read("README.md"))
    return re.sub(r"\]\((?!https?:|#)", f"]({address}/blob/v{VERSION}/", shown)


def read(name):
    return Path(name).read_text(encoding="utf-8")


def posix(pattern):
    return sorted(path.as_posix() for path in Path("csrc").glob(pattern))


library = Extension(
    "fastlstm._native",
    [path for path in posix("*.cpp") if path not in INSTRUCTIONS],
    depends=[*posix("*.h"), *INSTRUCTIONS],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    language="c++",
)
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', read("fastlstm/version.py"), re.MULTILINE)
setup(
    version=VERSION,
    long_description=page(),
    long_description_content_type="text/markdown",
    ext_modules=[library],
    distclass=Package,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)
