"""feature_loss's and joint_distillation_loss's CUDA implementation on CPU tensors; as emulate.py,
whose tools it uses.

``cuda(op, *args, arch=, check=, **options) -> (result, record)``. Layers are laid out in Python, as
csrc/feature_loss/ops.h does it with torch's tensors.
"""

import contextlib
import ctypes
from unittest import mock

import emulate
import torch

from kdkernels.ops import _backend
from kdkernels.ops.distillation_loss import OPTION_NAMES
from kdkernels.ops.feature_loss import METRICS, REDUCTIONS
from kdkernels.ops.feature_loss.layout import layout

SOURCES = (
    *(source for source in emulate.SOURCES if "distillation_loss" in source),
    "csrc/feature_loss/cuda.cu",
    "csrc/joint_distillation_loss/cuda.cu",
    "tests/emulate_features.cpp",
)
_REDUCTIONS = ("batchmean", "sum", "none", "mean")  # csrc/distillation_loss/problem.h
assert {*_REDUCTIONS} == {*REDUCTIONS}


class _Feature(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 6),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 7),
        *(
            (name, _Feature)
            for name in ("student", "teacher", "gradient", "mask", "variance", "variance_gradient")
        ),
        ("weight", ctypes.c_double),
        ("channels", ctypes.c_int64),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "metric", "normalize", "reduction", "upstream_stride")
        ),
        ("beta", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("given", "weights", "upstream", "loss", "parts")),
    ]


def _layer(student, teacher, gradient, mask, variance, variance_gradient, dim, elementwise):
    sizes, strides = layout(student, teacher, gradient, mask, dim, elementwise)
    merged = sizes[-1] != student.shape[dim]
    layer = _Layer()
    layer.sizes = (ctypes.c_int64 * 7)(*sizes, 1 if merged else teacher.shape[dim])
    tensors = {"student": student, "teacher": teacher, "gradient": gradient, "mask": mask}
    for (name, x), s in zip(tensors.items(), strides, strict=True):
        if x is not None:
            setattr(layer, name, _feature(x, (s.sample, *s.outer, s.inner, s.channel)))
    if variance is not None:
        layer.variance = _feature(variance, (0, 0, 0, 0, 0, variance.stride(0)))
    if variance_gradient is not None:
        layer.variance_gradient = _feature(variance_gradient, (0, 0, 0, 0, 0, 1))
    layer.channels = student.shape[dim]
    return layer


def _feature(x, strides) -> _Feature:
    return _Feature(x.data_ptr(), emulate._DTYPES[x.dtype], (ctypes.c_int64 * 6)(*strides))


def library(arch: str):
    import ptxrun

    root = emulate.ROOT
    lib = ptxrun.load_cuda_library(
        [root / source for source in SOURCES], arch=arch, include_dirs=[root / "csrc"]
    )
    lib = emulate._for_device(lib, ptxrun.device_for(arch))
    for name in ("kd_layer_bytes", "kd_logits_bytes"):
        getattr(lib, name).restype = ctypes.c_int64
    assert lib.kd_layer_bytes() == ctypes.sizeof(_Layer)
    assert lib.kd_logits_bytes() == ctypes.sizeof(emulate._Problem)
    return lib


class Implementation(emulate.Implementation):
    def feature_loss(self, students, *arguments):
        problem, loss, parts, grads, tracked = self._features(students, *arguments)
        size = ctypes.c_int64()
        self._run(self.lib.kd_feature_workspace, ctypes.byref(problem), ctypes.byref(size))
        workspace = torch.full((size.value,), 0x7F).byte()
        self._run(
            self.lib.kd_feature_loss,
            ctypes.byref(problem),
            ctypes.c_void_p(workspace.data_ptr()),
            loss=loss,
            parts=parts,
            workspace=workspace,
            **tracked,
        )
        return loss, parts, grads

    def joint_distillation_loss(self, student, teacher, *args):
        *arguments, wants_student, wanted = args
        options, features = arguments[: len(OPTION_NAMES)], arguments[len(OPTION_NAMES) :]
        gradient = emulate._fresh(student) if wants_student else None
        logits, loss, tensors = self._forward_problem(student, teacher, options, gradient, None)
        problem, _, parts, grads, tracked = self._features(*features, None, wanted)
        part = torch.full((1,), torch.nan)
        problem.loss = loss.data_ptr()
        size = ctypes.c_int64()
        call = (ctypes.byref(logits), ctypes.byref(problem), ctypes.c_void_p(part.data_ptr()))
        self._run(self.lib.kd_joint, *call, ctypes.byref(size), None)
        workspace = torch.full((size.value,), 0x7F).byte()
        self._run(
            self.lib.kd_joint,
            *call,
            ctypes.byref(size),
            ctypes.c_void_p(workspace.data_ptr()),
            loss=loss,
            part=part,
            parts=parts,
            workspace=workspace,
            **{f"logits_{name}": x for name, x in tensors.items()},
            **tracked,
        )
        rows = tensors["rows"]
        return loss, rows, torch.cat([part, parts]), emulate._or_empty(gradient, student), grads

    def _features(
        self,
        students,
        teachers,
        masks,
        log_variances,
        dims,
        metric,
        normalize,
        beta,
        weights,
        weights_tensor,
        reduction,
        upstream,
        wanted,
    ):
        """(problem, loss, parts, gradients, every other tensor that it may touch)."""
        n, none = len(students), reduction == "none"
        grads = [
            torch.full_like(x, torch.nan) if w else x.new_empty(0)
            for x, w in zip(students, wanted, strict=False)
        ]
        variance_grads = [
            torch.full(v.shape, torch.nan, dtype=v.dtype) if w and v is not None else None
            for v, w in zip(log_variances, wanted[n:], strict=True)
        ]
        loss = torch.full((n, students[0].shape[0]) if none else (), torch.nan)
        parts = torch.full((n,), torch.nan)
        elementwise = metric in ("l2", "smooth_l1") and not normalize
        layers = (_Layer * n)()
        for i in range(n):
            layers[i] = _layer(
                students[i],
                teachers[i],
                grads[i] if wanted[i] else None,
                masks[i],
                log_variances[i],
                variance_grads[i],
                dims[i],
                elementwise,
            )
            layers[i].weight = weights[i]
        upstream = None if upstream is None else upstream.contiguous()
        problem = _Problem(
            n,
            METRICS.index(metric),
            normalize,
            _REDUCTIONS.index(reduction),
            int(upstream is not None and upstream.numel() > 1),
            beta,
            ctypes.addressof(layers),
            None if weights_tensor is None else weights_tensor.data_ptr(),
            None if upstream is None else upstream.data_ptr(),
            loss.data_ptr(),
            parts.data_ptr(),
        )
        tracked = {"weights": weights_tensor, "upstream": upstream}
        for name, tensors in (
            ("student", students),
            ("teacher", teachers),
            ("mask", masks),
            ("variance", log_variances),
            ("grad", grads),
            ("variance_grad", variance_grads),
        ):
            tracked |= {f"{name}{i}": x for i, x in enumerate(tensors)}
        empty = [students[0].new_empty(0) if v is None else v for v in variance_grads]
        problem.kept = layers  # they live as long as what points to them
        return problem, loss, parts, grads + empty, tracked

    def scale_features_(self, grads, factor):
        n = len(grads)
        self._run(
            self.lib.kd_scale_features,
            ctypes.c_int64(n),
            (ctypes.c_void_p * n)(*(x.data_ptr() for x in grads)),
            (ctypes.c_int64 * n)(*(emulate._DTYPES[x.dtype] for x in grads)),
            (ctypes.c_int64 * n)(*(x.numel() for x in grads)),
            ctypes.c_void_p(factor.data_ptr()),
            factor=factor,
            **{f"grad{i}": x for i, x in enumerate(grads)},
        )


@contextlib.contextmanager
def installed(arch: str = "sm_90"):
    """Inside, backend="cpp" means the CUDA launchers under ptxrun."""
    implementation = Implementation(library(arch))
    original = _backend.implementation

    def chosen(backend, op, reference):
        return getattr(implementation, op) if backend == "cpp" else original(backend, op, reference)

    with (
        mock.patch.object(_backend, "choose", lambda *args: ("cpp", "emulated")),
        mock.patch.object(_backend, "implementation", chosen),
    ):
        yield implementation


def cuda(op, *args, arch="sm_90", check=True, **options):
    """(what op returns, ptxrun's record)."""
    import ptxrun

    with installed(arch), ptxrun.recording(check=check) as record:
        result = op(*args, **options)
    return result, record
