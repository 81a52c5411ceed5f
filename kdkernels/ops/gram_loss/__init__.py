"""gram_loss, nst_loss: losses between Gram matrices, without storing one that is larger than the
features.

With S (N, D) and T (N, D′) rows of student and teacher, P = S + T and E = S − T (the narrower of
the two widened by zeros, which changes no Gram matrix):

    R = SSᵀ − TTᵀ = ½·(PEᵀ + EPᵀ)
    ‖R‖² = ½·(⟨PᵀP, EᵀE⟩ + ⟨PᵀE, EᵀP⟩)          ∂‖R‖²/∂S = 4·RS = P·(EᵀP + EᵀE) + E·(PᵀP + PᵀE)

D×D products only: O(N·D²) time where N > D, and, because every term holds E, no cancellation where
student and teacher nearly agree (‖SᵀS‖² + ‖TᵀT‖² − 2·‖SᵀT‖² loses all digits there). Where N ≤ D
the Gram matrix itself is the smaller one. All of it is matrix products: plain torch, one
implementation for every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common import check_floats, check_pair, inverse_or_zero, loss_of_pairs

NORMALIZE = ("gram", "features", None)
CLIP = (None, "both", "teacher")

# Elements of a tile of Gram matrices: 16 MiB in float32.
_TILE = 1 << 22
# N/D above which row-normalised Gram matrices go through D×D products: these are fifteen, the tiles
# four and some ten passes over N×N.
_ROWS_A_COLUMN = 3


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: str | None = "gram",
    clip: str | None = None,
) -> Tensor:
    """Mean squared difference of the Gram matrices of student and teacher features.

    Args:
        student: (N, D), one Gram matrix of N rows (samples: ``flatten(1)`` feature maps), or
            (B, N, D), one of N tokens for each of B images (feature maps: ``flatten(2).mT``);
            float64, float32, bfloat16 or float16, any strides.
        teacher: of the same shape but for its width D, any of these dtypes; detached.
        normalize: "gram": each row of a Gram matrix over its L2 norm: similarity-preserving
            distillation, SP (Tung and Mori, ICCV 2019, equations 1 to 4), whose 1/b² is the mean.
            "features": each feature row over its norm, so that entries are cosines: DINOv3's Gram
            anchoring (Siméoni et al. 2025, section 4.2). None: as they are.
        clip: negative cosines, for "features" and None: None keeps them; "both" replaces those of
            either matrix by 0 (DINOv3's ``remove_neg``); "teacher" replaces the teacher's, and the
            student's where both are negative (``remove_only_teacher_neg``).

    Returns:
        The mean over all entries of all Gram matrices: () float32, float64 where an input is. The
        student's gradient is made in the same call, kept in that dtype and rounded to the student's
        once, with the upstream factor in it.

    A row of zeros has similarity 0 to everything and, where its norm divides, gradient 0 through
    it; N = 1 gives 0 under "gram" and "features" (unless a row is 0).

    Differences between implementations: torchdistill's SPKDLoss divides rows by their L1 norm (its
    ``normalize(G, 1)`` sets p = 1), a loss some 59 times smaller; RepDistiller, mdistiller and the
    paper by L2. DINOv3's first release looked for negative entries of the teacher after it had
    removed them, so ``remove_only_teacher_neg`` never touched the student; here it does.

    Memory beyond the inputs: Gram matrices where N ≤ D (no larger than the features), D×D matrices
    and a few times the features where N > D; with ``clip``, or under "gram" where N ≤ 3·D, tiles of
    16 MiB. Matrix products are PyTorch's: in float32 (TF32 if you allow it), also under autocast.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value, named.
        NotImplementedError: double backward.
    """
    accepted = "(N, D), or (B, N, D) for one Gram matrix an image; flatten(1) for samples, "
    check_pair(student, teacher, (2, 3), accepted + "flatten(2).mT for tokens")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize={normalize!r}; accepted: 'gram', 'features', None")
    if clip not in CLIP:
        raise ValueError(f"clip={clip!r}; accepted: None, 'both', 'teacher'")
    if clip is not None and normalize == "gram":
        raise ValueError(f"clip={clip!r} with normalize='gram'; accepted: 'features' or None")
    return loss_of_pairs(student, teacher, _gram, normalize, clip)


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Neuron selectivity transfer with the polynomial kernel (x·y)²: the squared maximum mean
    discrepancy between the channels of student and teacher, each over its L2 norm.

    Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017,
    equation 8 with d = 2, c = 0. Σ_ij (x_i·y_j)² = ⟨XᵀX, YᵀY⟩, so that it is

        mean over images of ‖XᵀX/C − YᵀY/C′‖²,   X (C, positions) of unit rows

    and needs the smaller of (C, C) and (positions, positions) matrices, where the zoos' way makes
    B·C·C′·positions numbers (805 MiB for a MiB of input).

    Args:
        student: (B, C, ...) float64, float32, bfloat16 or float16 feature maps.
        teacher: (B, C′, ...) of the same spatial shape; detached.

    Returns:
        () float32, float64 where an input is; all three kernel means counted, as the zoos'
        ``full_loss`` does: at least 0, and 0 where both have the same channels. The gradient as in
        ``gram_loss``. A channel of zeros contributes 0 and has gradient 0.

    Raises:
        TypeError, ValueError: an argument's type, dtype or shape, named.
        NotImplementedError: double backward.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check_floats(name, x)
        if x.dim() < 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: (B, C, positions...)")
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)}; accepted: the batch and spatial shape of "
            f"student {tuple(student.shape)}: resize one of them first, with "
            "torch.nn.functional.adaptive_avg_pool2d"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher is on {teacher.device}; accepted: student's device {student.device}"
        )
    return loss_of_pairs(student.flatten(2), teacher.flatten(2), _nst)


class GramLoss(nn.Module):
    """``gram_loss`` with its options stored: ``GramLoss(normalize=None)(student, teacher)``."""

    def __init__(self, *, normalize: str | None = "gram", clip: str | None = None):
        super().__init__()
        self.normalize, self.clip = normalize, clip

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return gram_loss(student, teacher, normalize=self.normalize, clip=self.clip)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, clip={self.clip!r}"


class NSTLoss(nn.Module):
    """``nst_loss`` as a module: ``NSTLoss()(student, teacher)``."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return nst_loss(student, teacher)


def _gram(
    student: Tensor, teacher: Tensor, normalize: str | None, clip: str | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    s, t = (x if x.dim() == 3 else x[None] for x in (student, teacher))
    inverse = None
    if normalize == "features":
        (s, inverse), (t, _) = _unit_rows(s), _unit_rows(t)
    n, width = s.shape[1], max(s.shape[2], t.shape[2])
    share = 1 / max(s.shape[0] * n * n, 1)
    if normalize == "gram":
        narrow = n > _ROWS_A_COLUMN * width
        total, grad = (_through_columns if narrow else _through_tiles)(s, t, share, with_grad)
    elif clip is None and n > width:
        total, grad = _squares_through_columns(s, t, share, with_grad)
    else:
        total, grad = _squares_through_tiles(s, t, clip, share, with_grad)
    if grad is not None:
        if inverse is not None:
            grad = _through_unit_rows(grad, s, inverse)
        grad = grad.reshape(student.shape)
    return total * share, grad


def _nst(student: Tensor, teacher: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    (s, inverse), (t, _) = _unit_rows(student), _unit_rows(teacher)
    # The positions' Gram matrices of channels over √C.
    s_scale, t_scale = s.shape[1] ** -0.5, t.shape[1] ** -0.5
    rows, teacher_rows = s.mT * s_scale, t.mT * t_scale
    share = 1 / max(s.shape[0], 1)
    if rows.shape[1] > max(rows.shape[2], teacher_rows.shape[2]):
        total, grad = _squares_through_columns(rows, teacher_rows, share * s_scale, with_grad)
    else:
        total, grad = _squares_through_tiles(rows, teacher_rows, None, share * s_scale, with_grad)
    if grad is not None:
        grad = _through_unit_rows(grad.mT, s, inverse)
    return total * share, grad


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their norms, 0 where they are 0, and one over the norms."""
    inverse = inverse_or_zero(torch.linalg.vector_norm(x, dim=-1, keepdim=True))
    return x * inverse, inverse


def _through_unit_rows(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    return (grad - (grad * unit).sum(-1, keepdim=True) * unit) * inverse


# ---- through D×D products ----


def _sum_and_difference(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    wider = t.shape[2] - s.shape[2]
    s, t = F.pad(s, (0, max(wider, 0))), F.pad(t, (0, max(-wider, 0)))
    return s + t, s - t


def _squares_through_columns(
    s: Tensor, t: Tensor, factor: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """‖R‖² and `factor` times its gradient, over all images; so do the other three."""
    p, e = _sum_and_difference(s, t)
    pp, ee, pe = p.mT @ p, e.mT @ e, p.mT @ e
    total = ((pp * ee).sum() + (pe * pe.mT).sum()) / 2
    if not with_grad:
        return total.clamp(min=0), None
    grad = p @ ((pe.mT + ee) * factor) + e @ ((pp + pe) * factor)
    return total.clamp(min=0), grad[..., : s.shape[2]]


def _through_columns(
    s: Tensor, t: Tensor, factor: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows of Gram matrices over their norms: with a_i = s_i/|row i| and b_i = t_i/|row i|, row i
    of the difference is r_i = S·a_i − T·b_i = ½·(P·(a_i − b_i) + E·(a_i + b_i)).
    """
    # The loss does not change with the scale of either; of one scale, both may cancel in E.
    s_scale, t_scale = (
        inverse_or_zero(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)) for x in (s, t)
    )
    columns = s.shape[2]
    p, e = _sum_and_difference(s * s_scale, t * t_scale)
    pp, ee, pe = p.mT @ p, e.mT @ e, p.mT @ e
    s, t = (p + e) / 2, (p - e) / 2
    s_rows = s @ ((pp + ee + pe + pe.mT) / 4)
    t_rows = t @ ((pp + ee - pe - pe.mT) / 4)
    s_inverse = inverse_or_zero((s * s_rows).sum(2, keepdim=True).clamp(min=0).sqrt())
    t_inverse = inverse_or_zero((t * t_rows).sum(2, keepdim=True).clamp(min=0).sqrt())
    a, b = s * s_inverse, t * t_inverse
    x, y = a - b, a + b
    p_r, e_r = (x @ pp + y @ pe.mT) / 2, (x @ pe + y @ ee) / 2
    total = ((x * p_r).sum() + (y * e_r).sum()) / 2
    if not with_grad:
        return total.clamp(min=0), None
    s_r = (p_r + e_r) / 2
    along = (a * s_r).sum(2, keepdim=True)
    # W = 2·(r_i − along·(S·a_i))/|row i| is the derivative by row i of SSᵀ: W·S and Wᵀ·S.
    grad = 2 * s_inverse * (s_r - along * s_inverse * s_rows)
    grad = grad + p @ (x.mT @ a) + e @ (y.mT @ a) - 2 * s @ ((along * a).mT @ a)
    return total.clamp(min=0), (grad * (s_scale * factor))[..., :columns]


# ---- through the Gram matrices, a tile of rows at a time ----


def _tiles(s: Tensor) -> list[slice]:
    images, n, _ = s.shape
    rows = max(1, _TILE // max(images * n, 1))
    return [slice(start, start + rows) for start in range(0, n, rows)]


def _squares_through_tiles(
    s: Tensor, t: Tensor, clip: str | None, factor: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    totals, grads = [], []
    for rows in _tiles(s):
        own, other = s[:, rows] @ s.mT, t[:, rows] @ t.mT
        gone = None
        if clip is not None:
            gone = own < 0 if clip == "both" else (own < 0) & (other < 0)
            other = other.clamp(min=0)
        difference = (own if gone is None else own.masked_fill(gone, 0)) - other
        totals.append(difference.square().sum())
        if with_grad:
            if gone is not None:
                difference = difference.masked_fill(gone, 0)
            grads.append((difference * (4 * factor)) @ s)
    return _joined(totals, grads, s, with_grad)


def _through_tiles(
    s: Tensor, t: Tensor, factor: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    totals, grad = [], None
    tiles = _tiles(s)
    for rows in tiles:
        (own, inverse), (other, _) = (_unit_rows(x[:, rows] @ x.mT) for x in (s, t))
        difference = own - other
        totals.append(difference.square().sum())
        if not with_grad:
            continue
        by_gram = _through_unit_rows(difference, own, inverse * (2 * factor))
        if len(tiles) == 1:
            return totals[0], (by_gram + by_gram.mT) @ s
        if grad is None:
            grad = torch.zeros_like(s)
        grad[:, rows] += by_gram @ s
        grad += by_gram.mT @ s[:, rows]
    return _joined(totals, [] if grad is None else [grad], s, with_grad)


def _joined(
    totals: list[Tensor], grads: list[Tensor], s: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    total = torch.stack(totals).sum() if totals else s.new_zeros(())
    if not with_grad:
        return total, None
    return total, torch.cat(grads, 1) if grads else torch.zeros_like(s)
