"""Counts of a call: run on the CPU through ptxrun, a few rows of it, at the vocabulary in question.

`count` records every kernel that the call launches (bytes, exponentials, instructions from the PTX
that ran; registers and spills from ptxas) and every operator of PyTorch's beside them (bytes from
the sizes of its tensors). Run as a program it counts Liger-Kernel's ops, one package version a
process, because all versions are called `liger_kernel`.
"""

import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .roofline_model import Launch, Work

ROOT = Path(__file__).parents[1]
PTXRUN = ROOT.parent / "shared" / "ptxrun"

MUFU = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")

# PyTorch's operators that read a tensor more often than once, on CUDA, for rows too long for shared
# memory: softmax and log_softmax read the row for the maximum, the sum and the result; their
# backwards read gradient and output for the sum, then again for the result. Tensors of the result's
# size that are (asked for, different); one block of 1024 threads a row.
PASSES = {
    "_log_softmax": (4, 2),
    "_softmax": (4, 2),
    "_log_softmax_backward_data": (5, 3),
    "_softmax_backward_data": (5, 3),
}
# Operators that launch nothing: they make or describe tensors.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze",
    "as_strided", "permute", "split", "lift_fresh", "is_same_size", "resize_", "reshape",
    "_reshape_alias", "unbind", "set_",
}  # fmt: skip
# Operators that only write.
FILLS = {"zero_", "fill_", "zeros", "zeros_like", "full", "full_like", "ones_like", "randn_like"}
# Operators whose result the host waits for.
WAITS = {"_local_scalar_dense", "equal", "item", "is_nonzero"}


class Missing(Exception):
    """ptxrun, Triton or a package is not here; the message says which."""


def require() -> None:
    """Raise Missing with what to do unless kernels can be run and assembled here."""
    if PTXRUN.is_dir() and str(PTXRUN) not in sys.path:
        sys.path.append(str(PTXRUN))
    for module, remedy in (
        ("triton", "pip install triton"),
        ("ptxrun", f"put its folder at {PTXRUN} or on PYTHONPATH"),
    ):
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise Missing(f"{module} does not import here ({e}): {remedy}") from e


def triton_driver(arch: int) -> Any:
    """Inside, Triton's kernels run on CPU tensors, for that architecture."""
    return importlib.import_module("ptxrun.triton_driver").installed(arch=arch)


class _Operators(TorchDispatchMode):
    """Notes PyTorch's operators, in order, among the kernels that `launches` receives."""

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches, self.waits = launches, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        before = _storages((args, kwargs))
        result = func(*args, **kwargs)
        if name in WAITS:
            self.waits += 1
        after = _storages(result)
        # Ours are made of launches that are noted already.
        if name in FREE or func.namespace == "kdkernels" or not (after or name in WAITS):
            return result
        size = float(sum(after.values()))
        if name in PASSES:
            asked, different = (times * size for times in PASSES[name])
            rows = result.numel() // result.shape[-1]
            launch = Launch(name, False, asked, different, blocks=rows, threads=1024)
            self.launches.append(launch)
            return result
        if name in FILLS:
            moved = size
        elif name in ("copy_", "index_put_"):
            moved = 2.0 * min(before.values())
        else:
            moved = sum(before.values()) + size
        self.launches.append(Launch(name, False, moved, moved))
        return result


def _storages(tree: Any) -> dict[int, int]:
    """Bytes of each tensor in it, one where several are views of the same memory."""
    found: dict[int, int] = {}
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            at = leaf.data_ptr()
            found[at] = max(found.get(at, 0), leaf.numel() * leaf.element_size())
    return found


@contextmanager
def _launched(launches: list[Launch], arch: int) -> Iterator[None]:
    """Puts the counts of every launch that ptxrun makes inside at the end of `launches`."""
    ptxrun, module = (importlib.import_module(name) for name in ("ptxrun", "ptxrun.module"))
    original = ptxrun.Module.launch

    def launch(self, name, grid, block, args, **options):
        options["check"] = "traffic"
        stats = original(self, name, grid, block, args, **options)
        # Plain addresses (CUDA host code) have their sizes from ptxrun.tracked.
        sizes = {label: size for _, size, label in module._tracked}
        for label, argument in zip(options.get("names") or (), args, strict=False):
            span = None if isinstance(argument, (bytes, bytearray)) else module.memory_of(argument)
            if span:
                sizes[label] = span[1]
        launches.append(from_stats(stats, self, sizes, arch))
        return stats

    ptxrun.Module.launch = launch
    try:
        yield
    finally:
        ptxrun.Module.launch = original


def from_stats(stats: Any, module: Any, sizes: dict[str, int], arch: int) -> Launch:
    """ptxrun's Stats of one launch as counts; `sizes`: bytes of each argument where known."""
    requested = unique = 0
    for label, traffic in stats.arguments.items():
        if label == "(parameters)":
            continue
        # Arguments that are the same tensor share a label, "a|b".
        size = max((sizes[part] for part in label.split("|") if part in sizes), default=None)
        # Sectors, as a warp's threads that read one number ask for it once.
        asked = 32 * traffic.sectors
        requested += asked
        moved = (traffic.read, traffic.written + traffic.atomic)
        unique += asked if size is None else min(asked, sum(min(part, size) for part in moved))
    threads = stats.block[0] * stats.block[1] * stats.block[2]
    blocks = stats.grid[0] * stats.grid[1] * stats.grid[2]
    instructions = sum(stats.opcodes.values())
    registers, spilled = _assembled(module, stats.kernel, arch)
    if spilled:
        # ptxas counts the spill instructions of the text; here each runs as often as the average
        # instruction does, which is an estimate.
        spilled *= instructions / len(module.kernel(stats.kernel).unit.instructions)
    return Launch(
        # C++: without the part that nvcc makes anew for each build
        name=re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w*?_[0-9a-f]{8}(?=\d)", "", stats.kernel),
        kernel=True,
        requested=requested,
        unique=unique,
        mufu=sum(stats.opcodes.get(name, 0) for name in MUFU),
        fma=stats.opcodes.get("fma", 0),
        instructions=instructions,
        blocks=blocks,
        threads=threads,
        registers=registers,
        shared=stats.shared_bytes,
        spilled=spilled,
    )


_assembled_cache: dict[tuple[str, str, int], tuple[int, float]] = {}


def _assembled(module: Any, kernel: str, arch: int) -> tuple[int, float]:
    """Registers of a thread, and bytes of spill stores and loads in its text, as ptxas says."""
    key = (module.ptx, kernel, arch)
    if key not in _assembled_cache:
        import triton

        # Triton ships two; this one knows the PTX version it emits, for every architecture.
        ptxas = triton.knobs.nvidia.ptxas_blackwell.path
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.ptx")
            source.write_text(module.ptx)
            target = re.search(r"^\.target\s+(\w+)", module.ptx, re.MULTILINE)
            assert target, "PTX without a .target line"
            command = [ptxas, "-v", f"-arch={target[1]}", str(source), "-o", f"{folder}/out"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses {kernel}: {done.stderr}")
        part = done.stderr.split(f"Compiling entry function '{kernel}'")[1]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        assert spills and used, f"ptxas -v says {part}"
        _assembled_cache[key] = (int(used[1]), float(spills[1]) + float(spills[2]))
    return _assembled_cache[key]


def count(step: Callable[[], Any], arch: int) -> Work:
    """The launches of `step`, which runs Triton kernels on CPU tensors, for that architecture."""
    launches: list[Launch] = []
    with triton_driver(arch), _launched(launches, arch):
        with _Operators(launches) as operators:
            step()
    return Work(tuple(launches), operators.waits)


# kdkernels ----------------------------------------------------------------------------------------


def our_step(
    op: str, divergence: str, ce: bool, mode: str, rows: int, columns: int, backend: str
) -> Callable[[], Any]:
    """A call of ours on bfloat16 logits; a backward without the accumulation that may follow it."""
    import kdkernels

    torch.manual_seed(0)
    student = torch.randn(rows, columns).bfloat16().requires_grad_()
    teacher = torch.randn(rows, columns).bfloat16()
    labels = torch.randint(columns, (rows,)) if ce else None
    options: dict[str, Any] = {"divergence": divergence, "backend": backend}
    if ce:
        options["ce_weight"] = 0.5

    def forward() -> Any:
        if op == "softmax":
            return kdkernels.softmax(student, backend=backend)
        return kdkernels.distillation_loss(student, teacher, labels, **options)

    if mode == "one pass":
        logits = student.detach()
        return lambda: kdkernels.distillation_loss_and_grad(logits, teacher, labels, **options)
    if mode == "forward":
        return forward
    output = forward()
    upstream = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, student, upstream, retain_graph=True)


def count_ours(job: dict[str, Any], backend: str, arch: int) -> Work:
    """Counts of one job {op, divergence, ce, mode, rows, columns} by our Triton or CUDA kernels."""
    require()
    if backend == "triton":
        with triton_driver(arch):
            step = our_step(**job, backend="triton")
        return count(step, arch)
    path = ROOT / "tests" / "emulate.py"
    spec = importlib.util.spec_from_file_location("emulate", path)
    assert spec and spec.loader
    emulate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulate)
    launches: list[Launch] = []
    # PyTorch's operators are not counted: the emulation's own, none of them runs on a card.
    with emulate.installed(f"sm_{arch}"):
        step = our_step(**job, backend="cpp")
        with _launched(launches, arch):
            step()
    return Work(tuple(launches))


# Liger-Kernel -------------------------------------------------------------------------------------


def liger_folder(version: str) -> Path:
    """Where that version is unpacked: $KDKERNELS_LIGER, else the temporary folder."""
    root = os.environ.get("KDKERNELS_LIGER", tempfile.gettempdir())
    return Path(root, f"liger-{version}")


def install_liger(version: str) -> Path:
    """The folder of an installed version; pip puts it there the first time."""
    folder = liger_folder(version)
    if not (folder / "liger_kernel").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), f"liger-kernel=={version}"], check=True)
    return folder


def liger_step(op: str, mode: str, rows: int, columns: int, upstream: str) -> Callable[[], Any]:
    """A call as Liger's benchmark scripts time it, its inputs made and its warm-up done.

    `upstream`: the gradient that a loss's backward starts from, "one" as `loss.backward()` does, or
    "random" (the scripts of 2026), which Liger's losses multiply into their gradient.

    Those give the losses float32 distributions that hang from an autograd graph, so that a backward
    goes on through log_softmax or softmax into a leaf whose gradient accumulates; cross entropy's
    logits are a leaf themselves, whose gradient is dropped before a timed backward.
    """
    if op.startswith("from logits: "):
        return _liger_from_logits(op.removeprefix("from logits: "), rows, columns)
    torch.manual_seed(0)
    ops = importlib.import_module(f"liger_kernel.ops.{op}")
    logits = torch.randn(rows, columns, requires_grad=True)
    teacher = torch.randn(rows, columns)
    given = None
    if op == "cross_entropy":
        labels = torch.randint(columns, (rows,))
        student, function = logits, ops.LigerCrossEntropyFunction
        extra = _cross_entropy_options(function)

        def forward() -> Any:
            found = function.apply(student, labels, *extra)
            return found[0] if isinstance(found, tuple) else found
    elif op == "kl_div":
        student, target = logits.log_softmax(-1), teacher.softmax(-1)

        def forward() -> Any:
            return ops.LigerKLDivLossFunction.apply(student, target, "batchmean", False)
    elif op == "jsd":
        student, target = logits.log_softmax(-1), teacher.log_softmax(-1)

        def forward() -> Any:
            return ops.LigerJSDFunction.apply(student, target, None, 0.5, -100)
    elif op == "tvd":
        student, target = logits.softmax(-1), teacher.softmax(-1)

        def forward() -> Any:
            return ops.LigerTVDLossFunction.apply(student, target, None, "batchmean", -100)
    elif op in ("softmax", "rms_norm"):
        student = torch.randn(rows, columns, dtype=torch.bfloat16, requires_grad=True)
        given = torch.randn(rows, columns, dtype=torch.bfloat16)
        weight = torch.ones(columns, requires_grad=True)

        def forward() -> Any:
            if op == "softmax":
                return ops.LigerSoftmaxFunction.apply(student)
            return ops.LigerRMSNormFunction.apply(student, weight, 1e-6)
    else:
        raise ValueError(f"op is {op!r}")

    if mode in ("forward", "no-grad-forward"):
        return forward
    if upstream == "random" and given is None:
        given = torch.rand(())
    if mode == "full":

        def full() -> None:
            forward().backward(given, retain_graph=op != "cross_entropy")

        full()
        return full
    loss = forward()

    def backward() -> None:
        loss.backward(given, retain_graph=True)

    backward()
    if student.is_leaf:
        student.grad = None
    return backward


def _liger_from_logits(op: str, rows: int, columns: int) -> Callable[[], Any]:
    """Loss and gradient from bfloat16 logits, as ours: what surrounds Liger's kernel counts too.

    fused_linear_jsd: hidden size 64, one row a chunk, and no gradient of the weight.
    """
    torch.manual_seed(0)
    ops = importlib.import_module(f"liger_kernel.ops.{op}")
    student = torch.randn(rows, columns).bfloat16().requires_grad_()
    teacher = torch.randn(rows, columns).bfloat16()
    if op == "fused_linear_jsd":
        hidden = torch.randn(rows, 64).bfloat16().requires_grad_()
        weight = torch.randn(columns, 64).bfloat16()
        inputs = (hidden, weight, hidden.detach(), weight)
        return lambda: ops.LigerFusedLinearJSDFunction.apply(*inputs)
    if op == "cross_entropy":
        labels = torch.randint(columns, (rows,))
        function = ops.LigerCrossEntropyFunction
        logits = student * 1
        return lambda: function.apply(logits, labels, *_cross_entropy_options(function))
    options: tuple[Any, ...]
    if op == "kl_div":
        function, options = ops.LigerKLDivLossFunction, ("batchmean", True)
    elif op == "jsd":
        function, options = ops.LigerJSDFunction, (None, 0.5, -100)
    else:
        function, options = ops.LigerTVDLossFunction, (None, "batchmean", -100)

    def step() -> None:
        own, other = (
            x.float().softmax(-1) if op == "tvd" else x.float().log_softmax(-1)
            for x in (student, teacher)
        )
        loss = function.apply(own, other, *options)
        torch.autograd.grad(loss, student)

    return step


def _cross_entropy_options(function: Any) -> list[Any]:
    """Positional arguments after the target: the defaults of each version's public module."""
    code = function.forward.__wrapped__ if hasattr(function.forward, "__wrapped__") else None
    defaults = {
        "weight": None, "ignore_index": -100, "lse_square_scale": 0.0, "label_smoothing": 0.0,
        "reduction": "mean", "softcap": None, "return_z_loss": False,
        "return_token_accuracy": False, "return_predicted_tokens": False,
    }  # fmt: skip
    names = list(inspect.signature(code or function.forward).parameters)[3:]
    return [defaults[name] for name in names]


def count_liger(version: str, jobs: list[dict[str, Any]]) -> Iterator[Work]:
    """Counts of jobs {op, mode, rows, columns, upstream, arch}, by that version in its process."""
    require()
    return _child(["liger", json.dumps(jobs)], [str(install_liger(version))])


def count_ours_apart(jobs: list[dict[str, Any]], backend: str, arch: int) -> Iterator[Work]:
    """``count_ours`` of each job in a process of its own: what CUDA host code once learned of its
    device stays true in a process, whichever library asks.
    """
    require()
    return _child(["ours", json.dumps(jobs), backend, str(arch)], [])


def _child(arguments: list[str], paths: list[str]) -> Iterator[Work]:
    """Runs this module as a program with more folders to import from; the counts that it prints."""
    paths = [*paths, os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.roofline_counts", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            cwd=ROOT,
        )
        assert child.stdout
        for line in child.stdout:
            yield Work.from_json(json.loads(line))
        if child.wait():
            errors.seek(0)
            raise RuntimeError(f"counting {' '.join(arguments)[:60]} failed:\n{errors.read()}")


def _main(whose: str, jobs: str, backend: str = "", arch: str = "") -> None:
    require()
    for job in json.loads(jobs):
        if whose == "ours":
            work = count_ours(job, backend, int(arch))
        else:
            with triton_driver(job["arch"]):
                step = liger_step(
                    job["op"], job["mode"], job["rows"], job["columns"], job["upstream"]
                )
            work = count(step, job["arch"])
        print(json.dumps(work.to_json()), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
