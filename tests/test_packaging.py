"""Installing, importing and packaging: with the library, without it,
and where it cannot be built.
"""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import _ext
from kdkernels.__main__ import report

ROOT = Path(__file__).parent.parent
CSRC = sorted(p for p in ROOT.glob("csrc/**/*.cpp") if "bindings" not in p.parts)


def python(*arguments, cwd=ROOT, **environment):
    """Run this interpreter; its own PATH first, as in an activated virtual environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PATH": path, "KDKERNELS_SKIP_BUILD": "0"} | environment,
        capture_output=True,
        text=True,
    )


# The import system answers "import of kdkernels._C halted" to a None in sys.modules.
HIDE_LIBRARY = "import sys; sys.modules['kdkernels._C'] = None\n"

RUN_WITHOUT_LIBRARY = """
import torch
import kdkernels
student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
for name in (None, "reference"):
    loss = kdkernels.distillation_loss(student, teacher, backend=name)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
print(kdkernels.explain(student))
try:
    kdkernels.distillation_loss(student, teacher, backend="cpp")
except RuntimeError as error:
    print("refused:", error)
"""


def test_import_and_ops_work_without_the_library():
    done = python("-c", HIDE_LIBRARY + RUN_WITHOUT_LIBRARY)
    assert done.returncode == 0, done.stderr
    explained, refused = done.stdout.splitlines()
    assert "reference" in explained
    assert refused.startswith("refused: ") and "halted" in refused


def test_report_names_the_missing_library_and_its_reason():
    main = HIDE_LIBRARY + "import runpy; runpy.run_module('kdkernels', run_name='__main__')"
    done = python("-c", main)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert rows["CPU"].split() == ["CPU", "level", "none"]
    (cpp,) = (line for line in done.stdout.splitlines() if line.startswith("cpp (CPU)"))
    assert cpp.split()[2] == "no" and "halted" in cpp
    assert rows["reference"].split()[1] == "yes"


def test_report_has_versions_and_every_backend():
    lines = report().splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert facts["kdkernels"] == kdkernels.__version__
    assert facts["torch"] == torch.__version__
    assert facts["CPU"] == f"level  {_ext.cpu_level()}"
    assert facts["threads"] == str(torch.get_num_threads())
    assert {"python", "numpy", "triton"} <= facts.keys()
    names = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert names == ["cpp", "cpp", "triton", "reference"]


def imported(path):
    """Absolute names of the modules that a file of the package imports."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The module's own name counts as one level, also that of __init__.
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_ops_never_import_trainer_or_command_line():
    above = ("kdkernels.trainer", "kdkernels.cli", "kdkernels.__main__")
    below = [p for p in ROOT.glob("kdkernels/**/*.py") if "trainer" not in p.parts]
    below = [p for p in below if p.name not in ("cli.py", "__main__.py")]
    assert ROOT / "kdkernels/ops/distillation_loss/__init__.py" in below
    wrong = [(str(p), name) for p in below for name in imported(p) if name.startswith(above)]
    assert not wrong
    # The same rule would see an upward import if there were one.
    assert any(name.startswith(above) for name in imported(ROOT / "kdkernels/cli.py"))


@pytest.fixture
def source(tmp_path):
    """A copy of what the library and the wheel are built from, without anything built before."""
    for folder in ("csrc", "kdkernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def wheel(source):
    (path,) = source.glob("dist/*.whl")
    return path.name, zipfile.ZipFile(path).namelist()


def library_in(names):
    return [name for name in names if name.endswith(".so")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="builds the library: needs a C++ compiler")
def test_one_abi3_wheel_holds_the_library(source):
    done = python("setup.py", "bdist_wheel", cwd=source, KDKERNELS_REQUIRE_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    name, names = wheel(source)
    assert name.startswith(f"kdkernels-{kdkernels.__version__}-cp310-abi3-linux_")
    assert library_in(names) == ["kdkernels/_C.abi3.so"]
    assert "kdkernels/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc"))]


# No compiler nor ninja at all, a compiler that is not there, and one that fails on every file.
BROKEN = [
    {"PATH": "/nonexistent"},
    {"CC": "/nonexistent", "CXX": "/nonexistent"},
    {"CC": "/bin/false", "CXX": "/bin/false"},
]


@pytest.mark.parametrize("broken", BROKEN)
def test_without_a_working_compiler_the_build_warns_and_goes_on(source, broken):
    done = python("setup.py", "bdist_wheel", cwd=source, **broken, KDKERNELS_REQUIRE_BUILD="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: kdkernels' C++ library was not built" in done.stderr
    _, names = wheel(source)
    assert not library_in(names) and "kdkernels/ops/distillation_loss/reference.py" in names


@pytest.mark.parametrize("broken", BROKEN)
def test_a_required_build_that_fails_is_an_error(source, broken):
    done = python("setup.py", "bdist_wheel", cwd=source, **broken, KDKERNELS_REQUIRE_BUILD="1")
    assert done.returncode != 0
    assert not list(source.glob("dist/*.whl"))


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("1", "KDKERNELS_CUDA=1, but "),
        ("yes", "KDKERNELS_CUDA=yes; accepted: 0, 1, or unset"),
    ],
)
def test_a_cuda_library_that_cannot_be_built_is_refused_by_name(source, switch, message):
    done = python(
        "setup.py", "bdist_wheel", cwd=source, KDKERNELS_CUDA=switch, CUDA_HOME="/nonexistent"
    )
    assert done.returncode != 0 and message in done.stderr
    assert not list(source.glob("dist/*.whl"))


# A CUDA build of torch, and a toolkit whose nvcc always fails.
SETUP_WITH_BROKEN_NVCC = """
import pathlib, runpy, sys, torch
home = pathlib.Path("cuda")
(home / "bin").mkdir(parents=True)
(home / "bin" / "nvcc").write_text("#!/bin/sh\\nexit 1\\n")
(home / "bin" / "nvcc").chmod(0o755)
torch.version.cuda = "13.0"
import torch.utils.cpp_extension
torch.utils.cpp_extension.CUDA_HOME = str(home.resolve())
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="builds the library: needs a C++ compiler")
def test_a_cuda_library_that_fails_does_not_take_the_cpu_library_along(source):
    build = ("-c", SETUP_WITH_BROKEN_NVCC, "bdist_wheel")
    done = python(*build, cwd=source, KDKERNELS_REQUIRE_BUILD="0", KDKERNELS_CUDA="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: kdkernels' CUDA library was not built" in done.stderr
    assert "nvcc" in done.stderr
    assert library_in(wheel(source)[1]) == ["kdkernels/_C.abi3.so"]
    shutil.rmtree(source / "cuda")
    done = python(*build, cwd=source, KDKERNELS_REQUIRE_BUILD="0", KDKERNELS_CUDA="1")
    assert done.returncode != 0


def test_a_skipped_build_makes_a_pure_wheel_and_needs_no_compiler(source):
    done = python(
        "setup.py", "bdist_wheel", cwd=source, PATH="/nonexistent", KDKERNELS_SKIP_BUILD="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, names = wheel(source)
    assert name == f"kdkernels-{kdkernels.__version__}-py3-none-any.whl"
    assert not library_in(names)


def test_the_source_distribution_holds_every_source(source):
    done = python("setup.py", "sdist", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = source.glob("dist/*.tar.gz")
    shutil.unpack_archive(archive, source / "unpacked")
    (unpacked,) = (source / "unpacked").iterdir()
    sources = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    assert {".cpp", ".h", ".cu", ".cuh"} <= {path.suffix for path in sources}
    for path in sources:
        assert (unpacked / path.relative_to(ROOT)).is_file(), path
    assert (unpacked / "setup.py").is_file() and (unpacked / "LICENSE").is_file()


def torch_free(path):
    return path.name != "module.cpp" and not path.name.startswith("register")


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None,
    reason="needs the cross compiler: apt-get install g++-aarch64-linux-gnu",
)
@pytest.mark.parametrize(
    "path", [*filter(torch_free, CSRC)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_kernels_compile_for_aarch64_with_no_x86_flag(path):
    flags = "-std=c++17 -O1 -fopenmp-simd -Wall -Werror".split()
    command = ["aarch64-linux-gnu-g++", *flags, "-c", str(path), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_kernels_to_compile_for_aarch64():
    assert any("distillation_loss" in path.parts for path in filter(torch_free, CSRC))
