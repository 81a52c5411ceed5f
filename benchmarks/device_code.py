"""python -m benchmarks.device_code: what the compilers made of the device kernels. See --help.

CUDA sources go through nvcc, Triton's kernels through its NVIDIA compiler, as the ops launch them,
to the machine code of an architecture; no GPU is needed. cuobjdump and nvdisasm (pip's Triton ships
both) tell the registers, and the instructions in the text of each kernel. An instruction counts
once however often it runs: unrolled copies, heads, tails and paths that another launch takes
included.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import run
from .cases import EAGER

TABLE = run.ROOT / "benchmarks" / "results" / "device_code.md"
ARCHITECTURES = (80, 90, 100)
# Triton's kernels as launched for these: every divergence on rows of whole 16-byte groups, then
# rows at odd addresses, float32, and rows that fit one tile.
TRITON_CALLS = [
    *(("distillation_loss", name, "bfloat16", 32000) for name in EAGER),
    ("distillation_loss", "forward_kl", "bfloat16", 50257),
    ("distillation_loss", "jsd", "bfloat16", 50257),
    ("distillation_loss", "forward_kl", "float32", 32000),
    ("distillation_loss", "forward_kl", "bfloat16", 100),
    ("softmax", "softmax", "bfloat16", 32000),
    ("softmax", "log_softmax", "bfloat16", 100),
]

parser = argparse.ArgumentParser(
    prog="python -m benchmarks.device_code",
    description="Compiles the CUDA and Triton kernels and writes registers, spills, widths of "
    f"loads and stores and special functions of each to {TABLE.relative_to(run.ROOT)}. Needs nvcc "
    "(CUDA_HOME or PATH) and Triton.",
)
parser.add_argument(
    "--check",
    action="store_true",
    help="write nothing; end with 1 where a kernel is worse than in the table: fewer warps fit, "
    "more spills or stack accesses, a smaller share of 16-byte accesses, more special functions",
)
parser.add_argument(
    "--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all; may be repeated"
)
parser.add_argument(
    "--only", action="append", metavar="PATTERN", help="as 'cuda *' or 'triton jsd/*': with --check"
)


class Unavailable(Exception):
    """A tool is not here; the message says which."""


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture: a line of the table."""

    arch: int
    source: str
    kernel: str
    registers: int
    # Bytes, as ptxas tells them of the kernel and the functions it may call (all of its source's).
    # It tells nothing of Triton's kernels, which call none: there, what `stack` moves.
    spills: int
    # Loads and stores of local memory: spills, and registers that a function which is called, not
    # inlined, saves.
    stack: int
    loads_16: int  # of global memory, and copies from it to shared memory, by bytes
    loads_8: int
    loads_4: int
    loads_less: int
    stores_16: int
    stores_8: int
    stores_4: int
    stores_less: int
    ex2: int
    lg2: int
    rcp: int
    other_mufu: int

    @property
    def key(self) -> tuple[int, str, str]:
        return self.arch, self.source, self.kernel


# ---- compiling: (name, machine code, what ptxas says) ----

Binary = tuple[str, bytes, str]


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        raise Unavailable(f"there is no nvcc in {home or 'PATH'}")
    return found


def cuda_binary(source: str, arch: int) -> list[Binary]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernels.cubin")
        command = [nvcc(), "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-Icsrc", source]
        done = subprocess.run(
            [*command, "-Xptxas", "-v", "-o", str(out)],
            cwd=run.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc refuses {source} for sm_{arch}:\n{done.stderr}")
        return [("", out.read_bytes(), done.stderr)]


def triton_binaries(call: tuple[str, str, str, int], arch: int) -> list[Binary]:
    """The kernels that one call of an op launches, forward and gradient."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    import kdkernels

    found: list[Binary] = []

    class Compiler(DriverBase):
        """Takes launches on CPU tensors: the kernel is compiled for `arch` and kept, not run."""

        def __init__(self) -> None:
            super().__init__()
            self.utils = self
            self.launcher_cls = lambda source, metadata: lambda *launch: None

        def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
            found.append((name, binary, ""))
            return None, None, 0, 0, 1024

        def unload_module(self, module: object) -> None:
            """Nothing was loaded."""

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 99 << 10, "multiprocessor_count": 100}

        @classmethod
        def is_active(cls) -> bool:
            return False

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, name: str) -> str:
            return name

        def get_benchmarker(self) -> Callable[..., Any]:
            raise NotImplementedError("nothing is run, so nothing is autotuned")

    op, name, dtype, vocab = call
    # Triton keeps what it compiled per kernel and device; only the first launch comes by here.
    for function in _jit_functions():
        function.device_caches.clear()
    driver = triton.runtime.driver
    before = driver._active  # None where no driver is in use yet
    driver.set_active(Compiler())
    try:
        x, y = torch.zeros(2, 2, vocab, dtype=getattr(torch, dtype)).unbind()
        x.requires_grad_()
        if op == "softmax":
            result = getattr(kdkernels, name)(x, backend="triton")
        else:
            labels = torch.zeros(2, dtype=torch.int64) if name == "dkd" else None
            result = kdkernels.distillation_loss(x, y, labels, divergence=name, backend="triton")
        torch.autograd.grad(result, x, torch.ones_like(result))
    finally:
        driver.set_active(before)
    return found


def _jit_functions() -> list[Any]:
    from triton.runtime.jit import JITFunction

    import kdkernels.ops.distillation_loss.triton_kernels as distillation
    import kdkernels.ops.softmax.triton_kernels as softmax

    values = [*vars(distillation).values(), *vars(softmax).values()]
    return [value for value in values if isinstance(value, JITFunction)]


# ---- reading machine code ----


@functools.cache
def tools() -> Path:
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"Triton, which brings cuobjdump, does not import: {error}") from None
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cuobjdump(option: str, path: Path) -> str:
    command = [str(tools() / "cuobjdump"), option, str(path)]
    environment = os.environ | {"PATH": f"{tools()}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
LOADS, STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")


SPILLS = re.compile(
    r"Function properties for (\S+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads"
)


def read(binary: bytes, arch: int, source: str, said: str) -> list[Row]:
    """`said`: by ptxas -v, or nothing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = cuobjdump("--dump-resource-usage", Path(file.name))
        text = cuobjdump("-sass", Path(file.name))
    registers = {
        name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)
    }
    spilled = {name: int(stores) + int(loads) for name, stores, loads in SPILLS.findall(said)}
    rows = []
    for part in text.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        found = row(arch, source, short(name), registers[name], OPCODE.findall(part))
        if said:
            called = sum(spills for other, spills in spilled.items() if other not in registers)
            found = replace(found, spills=spilled[name] + called)
        rows.append(found)
    return rows


def row(arch: int, source: str, kernel: str, registers: int, opcodes: list[str]) -> Row:
    count: Counter[str] = Counter()
    for opcode in opcodes:
        base, *modifiers = opcode.split(".")
        if base in ("LDL", "STL"):
            count["stack"] += 1
            count["spills"] += {"16": 16, "8": 8, "4": 4, "less": 1}[width(modifiers)]
        elif base in LOADS or base in STORES:
            kind = "loads" if base in LOADS else "stores"
            count[f"{kind}_{width(modifiers)}"] += 1
        elif base == "MUFU":
            name = modifiers[0].lower()
            count[name if name in ("ex2", "lg2", "rcp") else "other_mufu"] += 1
    names = [field.name for field in fields(Row)][4:]
    return Row(arch, source, kernel, registers, **{name: count[name] for name in names})


def width(modifiers: list[str]) -> str:
    """16 and more, 8, 4 or less bytes."""
    if "128" in modifiers or "256" in modifiers:
        return "16"
    if "64" in modifiers:
        return "8"
    return "less" if {"U8", "S8", "U16", "S16"} & {*modifiers} else "4"


def short(mangled: str) -> str:
    """distillation_rows<JSD> of what the compiler made of it."""
    if not mangled.startswith("_Z"):
        return mangled
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = done.stdout.strip().replace("(anonymous namespace)::", "").replace("kd::", "")
    # The arguments begin at the first bracket outside of template arguments: an enumerator is
    # (Family)2 there.
    depth = 0
    for end, sign in enumerate(name):
        depth += (sign == "<") - (sign == ">")
        if sign == "(" and depth == 0:
            name = name[:end]
            break
    return re.sub(r"^\w+ ", "", name)


# ---- the table ----


def sources() -> list[str]:
    """What can be compiled, by name."""
    files = sorted(str(p.relative_to(run.ROOT)) for p in run.ROOT.glob("csrc/**/*.cu"))
    return [f"cuda {file}" for file in files] + [f"triton {name}" for name in triton_calls()]


def triton_calls() -> dict[str, tuple[str, str, str, int]]:
    return {f"{call[1]}/{call[2]}/{call[3]}": call for call in TRITON_CALLS}


def compile_all(names: Iterable[str], architectures: Iterable[int]) -> list[Row]:
    jobs = [(name, arch) for arch in architectures for name in names]
    cuda = [job for job in jobs if job[0].startswith("cuda ")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        compiled = pool.map(lambda job: cuda_binary(job[0].removeprefix("cuda "), job[1]), cuda)
        binaries = dict(zip(cuda, compiled, strict=True))
    rows = []
    for name, arch in jobs:
        if (name, arch) not in binaries:
            call = triton_calls()[name.removeprefix("triton ")]
            binaries[name, arch] = triton_binaries(call, arch)
        for _, binary, said in binaries[name, arch]:
            rows += read(binary, arch, name, said)
    return rows


def compilers() -> str:
    import triton

    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"nvcc {release[1] if release else said}, Triton {triton.__version__}"


def table(rows: list[Row]) -> str:
    names = [field.name for field in fields(Row)]
    lines = [
        "# The machine code of the device kernels",
        "",
        f"Written by `python -m benchmarks.device_code`; {compilers()}. Instructions in the text "
        "of each kernel, each counted once however often it runs. Loads include copies from global "
        "to shared memory; a number is their width in bytes. `spills`: bytes of registers spilled; "
        "`stack`: loads and stores of local memory, which calls make too. ex2, "
        "lg2, rcp: special functions (MUFU).",
        "",
        "| " + " | ".join(names) + " |",
        "|---" * len(names) + "|",
    ]
    lines += ["| " + " | ".join(str(getattr(row, name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[tuple[int, str, str], Row]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = {}
    for line in lines[1:]:
        cells = line.strip("| ").split(" | ")
        arch, source, kernel, *numbers = cells
        found = Row(int(arch), source, kernel, *map(int, numbers))
        rows[found.key] = found
    return rows


def warps(registers: int) -> int:
    """Warps that fit one of a multiprocessor's four register files of 16384."""
    return 16384 // (32 * -(-max(registers, 1) // 8) * 8)


def wide_share(row: Row, kind: str) -> float:
    widths = [getattr(row, f"{kind}_{width}") for width in ("16", "8", "4", "less")]
    return widths[0] / sum(widths) if sum(widths) else 1.0


def worse(old: Row, new: Row) -> list[str]:
    """What has got worse."""
    found = []
    if warps(new.registers) < warps(old.registers):
        found.append(
            f"registers {old.registers} -> {new.registers}: {warps(old.registers)} -> "
            f"{warps(new.registers)} warps fit a scheduler"
        )
    for kind in ("loads", "stores"):
        before, now = wide_share(old, kind), wide_share(new, kind)
        if now < before - 0.005:
            found.append(f"16-byte {kind}: {before:.0%} -> {now:.0%} of them")
    for name in ("spills", "stack", "ex2", "lg2", "rcp", "other_mufu"):
        if getattr(new, name) > getattr(old, name):
            found.append(f"{name} {getattr(old, name)} -> {getattr(new, name)}")
    return found


def compare(
    known: dict[tuple[int, str, str], Row], rows: list[Row], names: set[str], archs: set[int]
) -> list[str]:
    """What is worse than in the table, for these sources and architectures."""
    found = []
    for new in rows:
        where = f"sm_{new.arch} {new.source} {new.kernel}"
        if new.key not in known:
            found.append(f"{where}: not in the table")
        else:
            found += [f"{where}: {what}" for what in worse(known[new.key], new)]
    made = {row.key for row in rows}
    for key, old in known.items():
        if old.arch in archs and old.source in names and key not in made:
            found.append(f"sm_{old.arch} {old.source} {old.kernel}: in the table, but no more")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser.parse_args(arguments)
    if not options.check and (options.arch or options.only):
        parser.error("--arch and --only go with --check: the table is written whole")
    archs = options.arch or [*ARCHITECTURES]
    names = [
        name
        for name in sources()
        if not options.only or any(fnmatch(name, pattern) for pattern in options.only)
    ]
    if not names:
        parser.error(f"nothing fits --only {' '.join(options.only)}; known: {', '.join(sources())}")
    try:
        by = compilers()
        rows = compile_all(names, archs)
    except (Unavailable, ImportError) as missing:
        print(f"python -m benchmarks.device_code cannot compile here: {missing}", file=sys.stderr)
        return 2
    if not options.check:
        run.write_whole(TABLE, table(rows).encode())
        print(f"written: {TABLE.relative_to(run.ROOT)}, {len(rows)} kernels")
        return 0
    committed = TABLE.read_text()
    if by not in committed:
        print(f"the table was not made by {by}: write it anew to compare", file=sys.stderr)
        return 2
    found = compare(parse(committed), rows, {*names}, {*archs})
    print("\n".join(found))
    print(f"{len(rows)} kernels compared with {TABLE.name}, {len(found)} differences for the worse")
    if found:
        print("where a change is meant, `python -m benchmarks.device_code` writes the table anew")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
