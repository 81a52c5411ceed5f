"""feature_loss's CUDA implementation on CPU tensors; as emulate.py, whose tools it uses.

``cuda(op, *args, arch=, check=, **options) -> (result, record)``. Layers are laid out here in
Python, as csrc/feature_loss/ops.h does it with torch's tensors.
"""

import contextlib
import ctypes
from unittest import mock

import emulate
import torch

from kdkernels.ops import _backend
from kdkernels.ops.feature_loss import METRICS, REDUCTIONS

SOURCES = ("csrc/feature_loss/cuda.cu", "tests/emulate_features.cpp")
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


def _merged(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """(size, strides…) outermost first, neighbours merged."""
    result: list[tuple[int, ...]] = []
    for size, *strides in sorted(dims, key=lambda d: -d[1] if d[1] else -(2**62)):
        if size == 1:
            continue
        if result and all(a == b * size for a, b in zip(result[-1][1:], strides, strict=True)):
            size *= result.pop()[0]
        result.append((size, *strides))
    return result


def _layer(student, teacher, gradient, mask, variance, variance_gradient, dim, elementwise):
    tensors = [student, teacher, student if gradient is None else gradient]
    of_mask = mask.unsqueeze(dim) if mask is not None else student

    def strides(k):
        return tuple(x.stride(k) for x in (*tensors, of_mask))

    dims = [(student.shape[k], *strides(k)) for k in range(1, student.dim()) if k != dim]
    channel = (student.shape[dim], *strides(dim))
    if elementwise and mask is None and len(_merged([*dims, channel])) <= 1:
        dims, channel = [*dims, channel], (1, 0, 0, 0, 0)
    dims = _merged(dims)
    outer = [(1, 0, 0, 0, 0)] * (4 - len(dims)) + dims
    layer = _Layer()
    merged = channel[0] == 1
    layer.sizes = (ctypes.c_int64 * 7)(
        student.shape[0],
        *(d[0] for d in outer),
        channel[0],
        1 if merged else teacher.shape[dim],
    )
    for k, (name, x) in enumerate(
        {"student": student, "teacher": teacher, "gradient": gradient, "mask": mask}.items()
    ):
        if x is not None:
            channel_stride = 0 if name == "mask" else channel[1 + k]
            s = (x.stride(0), *(d[1 + k] for d in outer), channel_stride)
            setattr(layer, name, _feature(x, s))
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
    lib.kd_layer_bytes.restype = ctypes.c_int64
    assert lib.kd_layer_bytes() == ctypes.sizeof(_Layer)
    return lib


class Implementation(emulate.Implementation):
    def feature_loss(
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
        size = ctypes.c_int64()
        self._run(self.lib.kd_feature_workspace, ctypes.byref(problem), ctypes.byref(size))
        workspace = torch.full((size.value,), 0x7F).byte()
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
        self._run(
            self.lib.kd_feature_loss,
            ctypes.byref(problem),
            ctypes.c_void_p(workspace.data_ptr()),
            loss=loss,
            parts=parts,
            workspace=workspace,
            **tracked,
        )
        empty = [students[0].new_empty(0) if v is None else v for v in variance_grads]
        return loss, parts, grads + empty

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
