"""The compiled libraries; everything static is in pyproject.toml.

KDKERNELS_SKIP_BUILD=1 installs without them. KDKERNELS_REQUIRE_BUILD=1 makes a failed build an
error; otherwise the installation goes on without the library that failed, and its calls run through
the other backends. KDKERNELS_CUDA=1 demands the CUDA library, 0 leaves it out; unset, it is built
where torch is built with CUDA and there is a CUDA toolkit (CUDA_HOME). TORCH_CUDA_ARCH_LIST chooses
its architectures.
"""

import glob
import os
import sys
from typing import Any

from setuptools import Extension, setup

# Ampere, Ada, Hopper and Blackwell, each as machine code, and PTX for what comes after them.
RELEASE_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
HEADERS = sorted(glob.glob("csrc/**/*.h", recursive=True))
CUDA_SOURCES = sorted(
    {
        "csrc/module.cpp",
        *glob.glob("csrc/*/register_cuda.cpp"),
        *glob.glob("csrc/**/*.cu", recursive=True),
    }
)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and newer


def cpu_library() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "kdkernels._C",
        # csrc/bindings is a module of the tests.
        sorted(
            {*glob.glob("csrc/**/*.cpp", recursive=True)}
            - {*glob.glob("csrc/bindings/*"), *glob.glob("csrc/*/register_cuda.cpp")}
        ),
        depends=HEADERS,
        include_dirs=[os.path.abspath("csrc")],
        # No -m flag: the sources themselves compile the row kernels for each CPU level, and the
        # library chooses at run time. Without -fno-trapping-math and -fno-math-errno g++ 12 does
        # not vectorise an exp loop, which then takes 12 times as long.
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",
            "-fopenmp-simd",
            "-fno-trapping-math",
            "-fno-math-errno",
            "-fvisibility=hidden",
            STABLE_ABI,
        ],
        py_limited_api=True,  # also defines Py_LIMITED_API for Python 3.10
    )


def cuda_library() -> Extension | None:
    """None where it is not to be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    switch = os.environ.get("KDKERNELS_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"KDKERNELS_CUDA={switch}; accepted: 0, 1, or unset")
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif CUDA_HOME is None or not os.path.isfile(os.path.join(CUDA_HOME, "bin", "nvcc")):
        missing = f"there is no nvcc in CUDA_HOME={CUDA_HOME}"
    if switch == "1" and missing:
        raise SystemExit(f"KDKERNELS_CUDA=1, but {missing}")
    if switch == "0" or missing:
        return None
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", RELEASE_ARCHITECTURES)
    return CUDAExtension(
        "kdkernels._C_cuda",
        CUDA_SOURCES,
        depends=HEADERS + sorted(glob.glob("csrc/**/*.cuh", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={
            "cxx": ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI],
            "nvcc": ["-std=c++17", "-Xcompiler=-fvisibility=hidden"],
        },
        py_limited_api=True,
    )


def build() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        extensions: list[Extension]
        build_temp: str

        def build_extensions(self) -> None:
            """Each library by itself, so that one that fails does not take the other along."""
            built, folder = [], self.build_temp
            for extension in self.extensions:
                self.extensions = [extension]
                # module.cpp is compiled for both.
                self.build_temp = os.path.join(folder, extension.name)
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:  # ninja, the linker and a missing compiler all differ
                    demanded = ["KDKERNELS_REQUIRE_BUILD"]
                    if extension.name == "kdkernels._C_cuda":
                        demanded.append("KDKERNELS_CUDA")
                    if any(os.environ.get(switch) == "1" for switch in demanded):
                        raise
                    language = "CUDA" if extension.name == "kdkernels._C_cuda" else "C++"
                    print(
                        f"warning: kdkernels' {language} library was not built: {error}\n"
                        "warning: kdkernels installs without it, and its calls run through the "
                        "other backends; `python -m kdkernels` lists them",
                        file=sys.stderr,
                    )
            self.extensions = built

    libraries = [library for library in (cpu_library(), cuda_library()) if library is not None]
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_ext": BuildLibraries},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if os.environ.get("KDKERNELS_SKIP_BUILD") == "1" else build()))
