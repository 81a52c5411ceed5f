"""rkd_distance_loss, rkd_angle_loss: relational knowledge distillation (Park et al. 2019).

With d_ij = ‖x_i − x_j‖, δ_ij = d_ij/mean(d) and ψ Huber's loss with threshold 1:

    distance   mean_ij ψ(δˢ_ij − δᵗ_ij)
    angle      mean_ijk ψ(cosˢ_ijk − cosᵗ_ijk),   cos_ijk = cos∠(x_i, x_j, x_k) at the anchor x_j

The cosines are made of squared distances, cos_ijk = (d²_ij + d²_jk − d²_ik)/(2·d_ij·d_jk), so that
a triplet costs a few operations, not D of them, and the gradient is one (N, N) matrix of weights
away from the points:

    ∂L/∂x_i = Σ_j w_ij·(x_i − x_j)
    distance   w_ij = 2/N²·(ψ′_ij/mean − Σψ′·d/(mean²·N(N − 1)))/d_ij
    angle      w_ij = 4/N³·(U_ij + U_ji − ½·V_ij)
               U_ij = ½·Σ_k ψ′_ijk·(1/d_jk − cos_ijk/d_ij)/d_ij,   V_ik = Σ_j ψ′_ijk/(d_ij·d_jk)

``reference.py`` is the same in plain torch, ``triton_kernels.py`` in Triton, csrc/rkd_loss in C++.
"""

from torch import Tensor, nn

from .. import _backend
from .._common import check_pair, loss_of_pairs, two_dimensional
from . import reference

SCHEMAS = {
    "rkd_distance_loss": "(Tensor student, Tensor teacher, bool student_grad) -> (Tensor, Tensor)",
    "rkd_angle_loss": "(Tensor student, Tensor teacher, bool student_grad) -> (Tensor, Tensor)",
}
_backend.define(SCHEMAS, reference, f"{__name__}.triton_kernels")


def rkd_distance_loss(student: Tensor, teacher: Tensor, *, backend: str | None = None) -> Tensor:
    """RKD's distance-wise loss: distances between all pairs of a batch, each relative to their
    mean, compared with Huber's loss (``smooth_l1_loss``, threshold 1).

    Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, equations 5 to 7.

    Args:
        student: (N, D) float64, float32, bfloat16 or float16 features, one row a sample: flatten
            feature maps with ``flatten(1)``. Any row stride.
        teacher: (N, any width), any of these dtypes; detached.
        backend: None chooses; "cpp", "triton" or "reference" serves the call or raises.

    Returns:
        The mean over all N² ordered pairs, (i, i) included as in the authors' code: () float32,
        float64 where an input is. The student's gradient is made in the same call, kept in that
        dtype and rounded to the student's once, with the upstream factor in it.

    The mean distance is over the N·(N − 1) pairs i ≠ j, and the student's has its gradient.
    RepDistiller, mdistiller and the authors leave pairs out whose distance is 0, which theirs never
    is: they clamp d² at 1e-12. Here it may be: coincident points are exactly 0 apart, with gradient
    0 for that pair; where all points coincide every relative distance is 0; N = 1 gives 0, not NaN.
    mmrazor normalises rows first: pass ``torch.nn.functional.normalize(x, dim=1)`` for that.
    Weights in use: 25 (RepDistiller, mdistiller), 1 to 2 (the authors).

    Memory: two (N, N) matrices beside the gradient; the C++ library keeps none above N = 4096 and
    computes distances again. Bitwise the same on any number of threads. Where N and D are both in
    the thousands a Gram matrix is the faster, less exact way to distances (4096×1000 on one core:
    eager 2.1 s, this 2.7).

    Raises:
        TypeError, ValueError: an argument's type, dtype or shape, named.
        RuntimeError: a backend that cannot serve the call.
        NotImplementedError: double backward.
    """
    return _call("rkd_distance_loss", student, teacher, backend)


def rkd_angle_loss(student: Tensor, teacher: Tensor, *, backend: str | None = None) -> Tensor:
    """RKD's angle-wise loss: the cosines of the angles between all triplets of a batch, compared
    with Huber's loss (``smooth_l1_loss``, threshold 1).

    Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, equations 8 and 9.

    Args:
        student, teacher, backend: as in ``rkd_distance_loss``.

    Returns:
        The mean over all N³ ordered triplets, degenerate ones (whose cosine is 0, or 1 where both
        ends are one point) included as in the authors' code: () float32, float64 where an input is.
        The gradient as in ``rkd_distance_loss``.

    An arm between coincident points has cosine 0 and gradient 0. N = 1 and N = 2 give 0. Weights in
    use: 50 (RepDistiller, mdistiller), 2 (the authors).

    Time is O(N³ + N²·D) instead of O(N³·D), memory a few (N, N) matrices (squared distances in
    float64) instead of N²·D and N³. Bitwise the same on any number of threads.

    Raises:
        As ``rkd_distance_loss``.
    """
    return _call("rkd_angle_loss", student, teacher, backend)


class RKDDistanceLoss(nn.Module):
    """``rkd_distance_loss`` as a module: ``RKDDistanceLoss()(student, teacher)``."""

    def __init__(self, *, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_distance_loss(student, teacher, backend=self.backend)


class RKDAngleLoss(nn.Module):
    """``rkd_angle_loss`` as a module: ``RKDAngleLoss()(student, teacher)``."""

    def __init__(self, *, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_angle_loss(student, teacher, backend=self.backend)


def _call(op: str, student: Tensor, teacher: Tensor, backend: str | None) -> Tensor:
    check_pair(student, teacher, (2,), "(N, D) with D >= 1; flatten(1) what has more dimensions")
    chosen, why = _backend.choose(backend, student.device, (student.dtype, teacher.dtype))
    _backend.warn_of_reference(chosen, why, student.device)
    return loss_of_pairs(student, teacher, _loss_and_grad, op, chosen)


def _loss_and_grad(
    student: Tensor, teacher: Tensor, op: str, backend: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    rows = [two_dimensional(x, x.shape[1]) for x in (student, teacher)]
    return _backend.implementation(backend, op, reference)(*rows, with_grad)
