"""The C++ library; everything static is in pyproject.toml.

KDKERNELS_SKIP_BUILD=1 installs without it. KDKERNELS_REQUIRE_BUILD=1 makes a failed build an error;
otherwise the installation goes on without the library and ops run through backend="reference".
"""

import glob
import os
import sys

from setuptools import setup


def library() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildLibrary(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # ninja, the linker and a missing compiler all differ here
                if os.environ.get("KDKERNELS_REQUIRE_BUILD") == "1":
                    raise
                print(
                    f"warning: kdkernels' C++ library was not built: {error}\n"
                    "warning: kdkernels installs without it, and every op runs through "
                    'backend="reference"; install g++ and reinstall to have it',
                    file=sys.stderr,
                )

    extension = CppExtension(
        "kdkernels._C",
        # csrc/bindings is a module of the tests.
        sorted({*glob.glob("csrc/**/*.cpp", recursive=True)} - {*glob.glob("csrc/bindings/*")}),
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
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
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ],
        py_limited_api=True,  # also defines Py_LIMITED_API for Python 3.10
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildLibrary},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if os.environ.get("KDKERNELS_SKIP_BUILD") == "1" else library()))
