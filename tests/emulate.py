"""The CUDA implementation of an op on CPU tensors, through its own launchers and ptxrun.

``cuda(op, *args, arch=, check=, **options) -> (result, record)`` takes a public op of kdkernels
with the op's own arguments. The op's Python checks and autograd are the real ones; what would be
dispatched to the compiled library is handed, as Problem<float>, to the launchers of csrc/, compiled
for ptxrun's CUDA runtime, which runs nvcc's PTX on the CPU. ``record`` is ptxrun's: launches, bytes
per argument, opcodes, faults.
"""

import contextlib
import ctypes
import os
import pathlib
import shutil
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch

from kdkernels.divergences import DIVERGENCES
from kdkernels.ops import _backend
from kdkernels.ops.distillation_loss import OPTION_NAMES, REDUCTIONS, reference

ROOT = pathlib.Path(__file__).resolve().parent.parent
PTXRUN = ROOT.parent / "shared" / "ptxrun"
SOURCES = (
    "csrc/distillation_loss/cuda.cu",
    "csrc/distillation_loss/cuda_kl.cu",
    "csrc/distillation_loss/cuda_mixtures.cu",
    "csrc/distillation_loss/cuda_powers.cu",
    "csrc/logit_rows/cuda.cu",
    "csrc/softmax/cuda.cu",
    "tests/emulate_shim.cpp",
)
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/dtype.h


class DeviceError(RuntimeError):
    """What a CudaStatus other than 0 becomes."""


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not PTXRUN.is_dir():
        return f"{PTXRUN} is not there"
    sys.path[:0] = [] if str(PTXRUN) in sys.path else [str(PTXRUN)]
    import ptxrun.build

    for find in (ptxrun.build.find_nvcc, ptxrun.build.gxx):
        try:
            find()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            return str(error)
    return None


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_double),
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


class _Problem(ctypes.Structure):  # csrc/distillation_loss/problem.h
    _fields_ = [
        ("n", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        *((name, _Matrix) for name in ("student", "teacher", "student_grad", "teacher_grad")),
        ("labels", ctypes.c_void_p),
        ("divergence", ctypes.c_int),
        ("label_smoothing", ctypes.c_double),
        ("rows", ctypes.c_void_p),
        ("token_weights", ctypes.c_void_p),
        *(
            (name, _Parameter)
            for name in (
                "first",
                "second",
                "temperature",
                "teacher_temperature",
                "kd_weight",
                "ce_weight",
                "z_loss_weight",
                "normalizer",
            )
        ),
        *((n, ctypes.c_bool) for n in ("has_normalizer", "t_squared", "mask_kd", "return_stats")),
        ("ignore_index", ctypes.c_int64),
        ("reduction", ctypes.c_int),
        ("masks", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("upstream", ctypes.c_void_p),
        ("upstream_stride", ctypes.c_int64),
    ]


class _SoftmaxProblem(ctypes.Structure):  # csrc/softmax/problem.h
    _fields_ = [
        ("x", _Matrix),
        ("output", _Matrix),
        ("gradient", _Matrix),
        ("temperature", _Parameter),
        ("log", ctypes.c_bool),
    ]


def _matrix(x: torch.Tensor | None) -> _Matrix:
    if x is None:
        return _Matrix(None, 1, 0, 0)
    assert x.dim() == 2 and (x.shape[1] <= 1 or x.stride(1) == 1), "rows with columns of stride 1"
    return _Matrix(x.data_ptr(), _DTYPES[x.dtype], x.stride(0), x.shape[1])


def _parameter(value: float | None, tensor: torch.Tensor | None) -> _Parameter:
    if tensor is None:
        return _Parameter(0.0 if value is None else value, None, 0)
    return _Parameter(0.0, tensor.data_ptr(), 0 if tensor.numel() == 1 else 1)


def library(arch: str, root: pathlib.Path = ROOT) -> ctypes.CDLL:
    """The launchers and kernels of a source tree, built for `arch` and ptxrun's CUDA runtime.

    ptxrun's device is that of the library loaded last, so each run loads its own (built once).
    """
    import ptxrun

    lib = ptxrun.load_cuda_library(
        [root / source for source in SOURCES], arch=arch, include_dirs=[root / "csrc"]
    )
    lib = _for_device(lib, ptxrun.device_for(arch))
    for name in ("kd_problem_bytes", "kd_softmax_problem_bytes", "kd_workspace_bytes"):
        getattr(lib, name).restype = ctypes.c_int64
    assert lib.kd_problem_bytes() == ctypes.sizeof(_Problem)
    assert lib.kd_softmax_problem_bytes() == ctypes.sizeof(_SoftmaxProblem)
    return lib


_loaded_for: dict = {}  # the file of a library: the device it has seen


def _for_device(lib, device):
    """The launchers remember what their device can hold: another one gets another copy of them."""
    if _loaded_for.setdefault(lib._name, device) == device:
        return lib
    with tempfile.TemporaryDirectory() as folder:
        copy = type(lib)(shutil.copy(lib._name, folder), os.RTLD_LOCAL | os.RTLD_DEEPBIND)
    copy.failures = lib.failures
    return copy


class Implementation:
    """The functions of the op's reference module, by the CUDA launchers."""

    def __init__(self, lib: ctypes.CDLL):
        self.lib = lib

    def _run(self, function, *arguments, **tracked: torch.Tensor | None):
        """One launcher; `tracked` names the tensors it may touch."""
        import ptxrun

        text = ctypes.create_string_buffer(256)
        arrays = {name: x for name, x in tracked.items() if x is not None and x.numel()}
        with ptxrun.tracked(**_spans(arrays)):
            code = function(*arguments, text)
        self.lib.raise_failures()
        if code:
            raise DeviceError(text.value.decode())

    def _forward(self, student, teacher, options, student_grad, teacher_grad):
        problem, loss, tensors = self._forward_problem(
            student, teacher, options, student_grad, teacher_grad
        )
        none = loss.dim() == 1
        workspace = torch.full((self.lib.kd_workspace_bytes(),), 0x7F).byte()
        self._run(
            self.lib.kd_forward,
            ctypes.byref(problem),
            ctypes.c_void_p(None if none else loss.data_ptr()),
            ctypes.c_void_p(workspace.data_ptr()),
            loss=loss,
            workspace=workspace,
            **tensors,
        )
        return loss, tensors["rows"]

    def _forward_problem(self, student, teacher, options, student_grad, teacher_grad):
        """(problem, loss, every other tensor that it may touch)."""
        o = SimpleNamespace(**dict(zip(OPTION_NAMES, options, strict=True)))
        n, none = student.shape[0], o.reduction == "none"
        rows = torch.full(
            (len(reference.ROWS) + len(reference.STATS) * o.return_stats, n), torch.nan
        )
        loss, totals = torch.full(() if not none else (n,), torch.nan), torch.full((n,), torch.nan)
        problem = self._problem(
            student, teacher, rows, o.labels, o.divergence, o.label_smoothing, o.vocab_size
        )
        problem.student_grad, problem.teacher_grad = _matrix(student_grad), _matrix(teacher_grad)
        problem.token_weights = o.token_weights.data_ptr() if o.token_weights is not None else None
        for name in [name for name, kind in _Problem._fields_ if kind is _Parameter]:
            pair = (getattr(o, name), getattr(o, f"{name}_tensor"))
            setattr(problem, name, _parameter(*pair))
        problem.has_normalizer = o.normalizer is not None or o.normalizer_tensor is not None
        problem.t_squared, problem.mask_kd = o.t_squared, o.mask_kd
        problem.return_stats, problem.ignore_index = o.return_stats, o.ignore_index
        problem.reduction = REDUCTIONS.index(o.reduction)
        problem.totals = (loss if none else totals).data_ptr()
        tensors = {k: v for k, v in vars(o).items() if isinstance(v, torch.Tensor)}
        tensors |= dict(student=student, teacher=teacher, teacher_grad=teacher_grad)
        tensors |= dict(student_grad=None if student_grad is student else student_grad)
        return problem, loss, tensors | dict(rows=rows, totals=totals)

    def _problem(self, student, teacher, rows, labels, divergence, label_smoothing, vocab_size):
        problem = _Problem()
        problem.n, problem.vocab = student.shape[0], vocab_size
        problem.student, problem.teacher = _matrix(student), _matrix(teacher)
        problem.student_grad = problem.teacher_grad = _matrix(None)
        problem.labels = labels.data_ptr() if labels is not None else None
        problem.divergence = list(DIVERGENCES).index(divergence)
        problem.label_smoothing, problem.rows = label_smoothing, rows.data_ptr()
        return problem

    def distillation_loss(self, student, teacher, *options):
        return self._forward(student, teacher, options, None, None)

    def distillation_loss_and_grad(self, student, teacher, *args):
        *options, wants_teacher = args
        student_grad = _fresh(student)
        teacher_grad = _fresh(teacher) if wants_teacher else None
        loss, rows = self._forward(student, teacher, options, student_grad, teacher_grad)
        return loss, rows, student_grad, _or_empty(teacher_grad, teacher)

    def distillation_loss_and_grad_(self, student, teacher, *args):
        *options, wants_teacher = args
        teacher_grad = _fresh(teacher) if wants_teacher else None
        loss, rows = self._forward(student, teacher, options, student, teacher_grad)
        return loss, rows, _or_empty(teacher_grad, teacher)

    def distillation_loss_backward(
        self,
        grad_loss,
        student,
        teacher,
        rows,
        labels,
        divergence,
        label_smoothing,
        vocab_size,
        wants_student,
        wants_teacher,
    ):
        student_grad = _fresh(student) if wants_student else None
        teacher_grad = _fresh(teacher) if wants_teacher else None
        problem = self._problem(
            student, teacher, rows, labels, divergence, label_smoothing, vocab_size
        )
        problem.student_grad, problem.teacher_grad = _matrix(student_grad), _matrix(teacher_grad)
        upstream = grad_loss.contiguous()
        problem.upstream = upstream.data_ptr()
        problem.upstream_stride = 0 if upstream.numel() == 1 else 1
        self._run(
            self.lib.kd_backward,
            ctypes.byref(problem),
            student=student,
            teacher=teacher,
            student_grad=student_grad,
            teacher_grad=teacher_grad,
            rows=rows,
            labels=labels,
            upstream=upstream,
        )
        return _or_empty(student_grad, student), _or_empty(teacher_grad, teacher)

    def scale_rows_(self, grad, factor):
        matrix = _matrix(grad)
        self._run(
            self.lib.kd_scale_rows,
            ctypes.byref(matrix),
            ctypes.c_int64(grad.shape[0]),
            ctypes.c_void_p(factor.data_ptr()),
            ctypes.c_int64(0 if factor.numel() == 1 else 1),
            grad=grad,
            factor=factor,
        )

    def row_moments(self, x, vocab_size):
        out = torch.full((2, len(x)), torch.nan)
        matrix = _matrix(x)
        sizes = (ctypes.c_int64(len(x)), ctypes.c_int64(vocab_size))
        self._run(self.lib.kd_moments, ctypes.byref(matrix), *sizes, _pointer(out), x=x, out=out)
        return out

    def add_centered_(self, grad, x, mean, factor, vocab_size):
        matrices = [_matrix(grad), _matrix(x)]
        self._run(
            self.lib.kd_add_centered,
            *map(ctypes.byref, matrices),
            _pointer(mean),
            _pointer(factor),
            ctypes.c_int64(len(x)),
            ctypes.c_int64(vocab_size),
            grad=grad,
            x=x,
            mean=mean,
            factor=factor,
        )

    def temperature_sums(self, student, teacher, rows, labels, divergence, vocab_size):
        problem = self._problem(student, teacher, rows, labels, divergence, 0.0, vocab_size)
        out = torch.full((3, len(student)), torch.nan)
        self._run(
            self.lib.kd_temperature_sums,
            ctypes.byref(problem),
            _pointer(out),
            student=student,
            teacher=teacher,
            rows=rows,
            labels=labels,
            out=out,
        )
        return out

    def adaptive_weights(self, student, teacher, temperature, teacher_temperature, vocab_size):
        out = torch.full((len(student),), torch.nan)
        structures = [_matrix(student), _matrix(teacher)]
        structures += [_parameter(None, tau) for tau in (temperature, teacher_temperature)]
        self._run(
            self.lib.kd_adaptive_weights,
            *map(ctypes.byref, structures),
            ctypes.c_int64(len(student)),
            ctypes.c_int64(vocab_size),
            _pointer(out),
            student=student,
            teacher=teacher,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            out=out,
        )
        return out

    def softmax(self, x, temperature, temperature_tensor, log):
        output = _fresh(x)
        problem = _SoftmaxProblem(_matrix(x), _matrix(output), _matrix(None))
        problem.temperature, problem.log = _parameter(temperature, temperature_tensor), log
        self._run(
            self.lib.kd_softmax,
            ctypes.byref(problem),
            ctypes.c_int64(x.shape[0]),
            x=x,
            output=output,
            temperature=temperature_tensor,
        )
        return output

    def softmax_backward(self, grad, output, temperature, temperature_tensor, log):
        gradient = _fresh(output)
        problem = _SoftmaxProblem(_matrix(grad), _matrix(output), _matrix(gradient))
        problem.temperature, problem.log = _parameter(temperature, temperature_tensor), log
        self._run(
            self.lib.kd_softmax_backward,
            ctypes.byref(problem),
            ctypes.c_int64(grad.shape[0]),
            grad=grad,
            output=output,
            gradient=gradient,
            temperature=temperature_tensor,
        )
        return gradient


def _pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _fresh(like: torch.Tensor) -> torch.Tensor:
    """A result of a tensor's shape, full of NaN: what a kernel forgets to write is seen."""
    return torch.full(like.shape, torch.nan, dtype=like.dtype)


def _or_empty(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else x


def _spans(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor's memory as one flat tensor: the gaps between strided rows belong to it."""
    spans: dict[str, torch.Tensor] = {}
    seen = set()
    for name, x in arrays.items():
        if x.data_ptr() in seen:  # a teacher that is the student itself
            continue
        seen.add(x.data_ptr())
        size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        spans[name] = x.detach().as_strided((size,), (1,))
    return spans


@contextlib.contextmanager
def installed(arch: str = "sm_90", root: pathlib.Path = ROOT):
    """Inside, backend="cpp" means the CUDA launchers under ptxrun."""
    implementation = Implementation(library(arch, root))
    original = _backend.implementation

    def chosen(backend, op, reference):
        return getattr(implementation, op) if backend == "cpp" else original(backend, op, reference)

    with (
        mock.patch.object(_backend, "choose", lambda *args: ("cpp", "emulated")),
        mock.patch.object(_backend, "implementation", chosen),
    ):
        yield implementation


@contextlib.contextmanager
def recorded(check=True):
    """ptxrun's record of what runs inside."""
    import ptxrun

    with ptxrun.recording(check=check) as record:
        yield record


def cuda(op, *args, arch="sm_90", check=True, root=ROOT, **options):
    """(what op returns, ptxrun's record). `op` may be any function that calls ops, a backward
    included.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"emulate.cuda: {reason}")
    import ptxrun

    with installed(arch, root), ptxrun.recording(check=check) as record:
        result = op(*args, **options)
    return result, record
