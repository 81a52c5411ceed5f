"""The relation losses by their definitions: pairs, triplets, columns, nothing rearranged.

Plain torch with autograd, for any dtype: in float64 the truth, in float32 what a user of PyTorch
gets. Degenerate relations (a point with itself, a constant column, a row of zeros) are masked
before anything divides, so that autograd is right there too.
"""

import torch

import kdkernels


def _over(x, length):
    """x/length, 0 where the length is."""
    return torch.where(length > 0, x / torch.where(length > 0, length, 1), 0)


def _norm(x, dim):
    squares = x.square().sum(dim, keepdim=True)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)


def _huber(e):
    return torch.where(e.abs() < 1, e.square() / 2, e.abs() - 0.5).sum()


def gram(student, teacher, normalize="gram", clip=None):
    if normalize == "features":
        student, teacher = (_over(x, _norm(x, -1)) for x in (student, teacher))
    s, t = student @ student.mT, teacher @ teacher.mT
    if normalize == "gram":
        s, t = (_over(x, _norm(x, -1)) for x in (s, t))
    if clip == "both":
        s, t = s * (s > 0), t * (t > 0)
    if clip == "teacher":
        s, t = s * ~((s < 0) & (t < 0)), t * (t > 0)
    return (s - t).square().sum() / max(s.numel(), 1)


def nst(student, teacher):
    s, t = (_over(x, _norm(x, -1)) for x in (student.flatten(2), teacher.flatten(2)))

    def kernel(a, b):
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).square().mean()

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def rkd_distance(student, teacher):
    def relative(x):
        n = len(x)
        d = _norm(x[:, None] - x, -1)[..., 0]
        return _over(d, d.sum() / max(n * (n - 1), 1))

    return _huber(relative(student) - relative(teacher)) / max(len(student) ** 2, 1)


def rkd_angle(student, teacher):
    def cosines(x):
        arms = x[None] - x[:, None]  # (anchor, end, D)
        arms = _over(arms, _norm(arms, -1))
        return arms @ arms.mT

    return _huber(cosines(student) - cosines(teacher)) / max(len(student) ** 3, 1)


def dist(student, teacher, temperature=1.0, inter_weight=1.0, intra_weight=1.0):
    def correlation(a, b):
        a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
        return (_over(a, _norm(a, -1)) * _over(b, _norm(b, -1))).sum(-1).mean()

    p, q = (torch.softmax(x / temperature, -1).flatten(0, -2) for x in (student, teacher))
    inter, intra = 1 - correlation(p, q), 1 - correlation(p.T, q.T)
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def _without_backend(function, **options):
    return lambda s, t, backend=None: function(s, t, **options)


# What is tested: (ours, by definition, shapes of student and teacher).
LOSSES = {
    # Samples: fewer than columns (the Gram matrix), more (columns), of different widths.
    "sp": (_without_backend(kdkernels.gram_loss), gram, [((9, 40), (9, 30)), ((50, 6), (50, 9))]),
    # One sample more than 3·D: the first that goes through the columns; an image each.
    "sp of images": (
        _without_backend(kdkernels.gram_loss),
        gram,
        [((3, 19, 6), (3, 19, 6)), ((2, 18, 6), (2, 18, 6))],
    ),
    "token gram": (
        _without_backend(kdkernels.gram_loss, normalize="features"),
        lambda s, t: gram(s, t, "features"),
        [((3, 7, 10), (3, 7, 6)), ((2, 33, 6), (2, 33, 5))],
    ),
    "plain gram": (
        _without_backend(kdkernels.gram_loss, normalize=None),
        lambda s, t: gram(s, t, None),
        [((7, 10), (7, 6)), ((33, 6), (33, 8))],
    ),
    "clipped": (
        _without_backend(kdkernels.gram_loss, normalize="features", clip="both"),
        lambda s, t: gram(s, t, "features", "both"),
        [((2, 21, 6), (2, 21, 9))],
    ),
    "clipped by the teacher": (
        _without_backend(kdkernels.gram_loss, normalize="features", clip="teacher"),
        lambda s, t: gram(s, t, "features", "teacher"),
        [((2, 21, 6), (2, 21, 9))],
    ),
    # More positions than channels, and fewer.
    "nst": (
        _without_backend(kdkernels.nst_loss),
        nst,
        [((2, 5, 4, 4), (2, 7, 4, 4)), ((3, 16, 5), (3, 12, 5))],
    ),
    # 16 rows are a block, 4 are pulled at a time, 256 columns a stretch: none of them full.
    "rkd distance": (
        kdkernels.rkd_distance_loss,
        rkd_distance,
        [((37, 19), (37, 25)), ((18, 301), (18, 5)), ((3, 4), (3, 4))],
    ),
    "rkd angle": (
        kdkernels.rkd_angle_loss,
        rkd_angle,
        [((37, 19), (37, 25)), ((18, 301), (18, 5)), ((3, 4), (3, 4))],
    ),
    # A row of two blocks, a strip and more; three dimensions.
    "dist": (
        kdkernels.dist_loss,
        dist,
        [((40, 11), (40, 11)), ((7, 2100), (7, 2100)), ((2, 3, 30), (2, 3, 30))],
    ),
}
COMPILED = ("rkd distance", "rkd angle", "dist")  # have a C++ library and Triton kernels


def features(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def differentiated(function, student, teacher, **options):
    """(loss, student's gradient) of copies."""
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, teacher.detach().clone(), **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def assert_no_worse_than_torch(got, truth, own, half=None, units=4):
    """(loss, gradient) within max(2 × PyTorch's own error, `units`) of the truth, and a quarter
    more for the luck of one draw: of the loss itself, and of the gradient's largest element.
    `half`: the student's dtype, one of whose roundings is allowed too.
    """
    # In float64 the truth is PyTorch's own result, with errors of its own.
    unit = torch.finfo(got[0].dtype).eps * (8 if got[0].dtype == torch.float64 else 1)
    for x, want, theirs in zip(got, truth, own, strict=True):
        size = want.abs().max()
        bound = 1.25 * torch.maximum(2 * (theirs.double() - want).abs().max(), units * unit * size)
        if half and x.dim():
            info = torch.finfo(half)
            bound = bound + want.abs().clamp(min=info.smallest_normal) * info.eps / 2
        error = (x.double() - want).abs()
        assert (error <= bound).all(), (error.max(), bound.min(), size)
