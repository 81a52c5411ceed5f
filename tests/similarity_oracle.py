"""What similarity_loss should be, from its definition: every pair written out in float64.

Differences of all pairs, cosines by torch.nn.functional.cosine_similarity, keys that are left out
taken out of the matrix, divergences by the eager lines of oracle.py, gradients by autograd. Nothing
of kdkernels is used. ``eager`` is the same in the features' precision as people write it, with one
matrix product: what our errors are compared with.
"""

import oracle
import torch
import torch.nn.functional as F

KERNELS = ("rbf", "dot", "cosine", "pkt", "student_t", "rbf_softmax")


def inputs(
    kernel, n, m, width, teacher_width, own=False, parameters=False, dtype=torch.float32, shift=1.0
):
    """(features, options): the keys are the rows where `own`; `parameters`: γ and T are tensors
    that may be differentiated.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(rows, columns):
        x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return (x * columns**-0.5 + shift).to(dtype)

    x = {"student": normal(n, width), "teacher": normal(n, teacher_width)}
    if not own:
        x |= {"student_keys": normal(m, width), "teacher_keys": normal(m, teacher_width)}
    options = dict(kernel=kernel, gamma=2.5, temperature=0.7)
    if parameters:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name in ("gamma", "temperature"):
            x[name] = torch.tensor(options.pop(name), dtype=wide)
    return x, options


def scores(a, b, kernel, gamma, temperature, expanded):
    """φ of all pairs; `expanded`: distances from one matrix product."""
    if kernel in ("dot", "cosine", "pkt"):
        if kernel != "dot":
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        x = a @ b.t()
        if kernel == "pkt":
            x = ((1 + x) / 2).log()
        return gamma * x / temperature
    if expanded:
        d = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.t()).clamp(min=0)
    else:
        d = (a[:, None] - b[None]).square().sum(-1)
    if kernel == "rbf":
        return -gamma * d / temperature
    if kernel == "student_t":
        return -(1 + gamma * d).log() / temperature
    return gamma * (-d / temperature).exp()


def loss_of(
    x, *, kernel, divergence="forward_kl", parameters=None, exclude_diagonal=None, center=True,
    row_weights=None, reduction="batchmean", expanded=False, **numbers,
):  # fmt: skip
    """The loss, with a graph, of features as they are."""
    own = "student_keys" not in x
    exclude = own if exclude_diagonal is None else exclude_diagonal
    log_p = []
    for whose in ("student", "teacher"):
        a, b = x[whose], x.get(f"{whose}_keys", x[whose])
        gamma, temperature = (
            x.get(name, numbers.get(name))
            for name in _names_of_parameters(whose, x.keys() | numbers.keys())
        )
        used = torch.ones(len(b), dtype=torch.bool)
        if own and row_weights is not None:
            used = row_weights != 0
        if center:
            mean = b[used].mean(0)
            a, b = a - mean, b - mean
        rows = scores(a, b[used], kernel, gamma, temperature, expanded)
        keys = torch.arange(len(b))[used]
        log_p.append(
            [row[keys != i if exclude else ...].log_softmax(0) for i, row in enumerate(rows)]
        )
    k = {
        name: value if isinstance(value, bool) else torch.tensor([value], dtype=torch.float64)
        for name, value in {**oracle.DEFAULTS[divergence], **(parameters or {})}.items()
    }
    weights = torch.ones(len(x["student"])) if row_weights is None else row_weights
    total = []
    for i, (a, b) in enumerate(zip(*log_p, strict=True)):
        if weights[i] == 0 or len(a) == 0:
            total.append(torch.zeros((), dtype=x["student"].dtype))
        else:
            own_k = {n: v if isinstance(v, bool) else v.to(a.dtype) for n, v in k.items()}
            total.append(weights[i] * oracle._eager_rows(divergence, own_k, a, b, None).reshape(()))
    total = torch.stack(total)
    if reduction == "none":
        return total
    size = 1 if reduction == "sum" else weights.sum().to(total.dtype)
    keys = len(x.get("student_keys", x["student"])) if reduction == "mean" else 1
    return total.sum() / size / keys


def _names_of_parameters(whose, given):
    """Of γ and T: the teacher's where it has its own."""
    for name in ("gamma", "temperature"):
        theirs = f"teacher_{name}"
        yield theirs if whose == "teacher" and theirs in given else name


def differentiated(x, upstream=None, *, dtype, **options):
    wide = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    leaves = {k: v.requires_grad_() for k, v in wide.items() if k in GRADIENTS}
    loss = loss_of({**wide, **leaves}, **options)
    up = None if upstream is None else upstream.to(dtype)
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), up)


GRADIENTS = ("student", "student_keys", "gamma", "temperature")


def similarity(x, upstream=None, **options):
    """Loss and the gradients of what `inputs` gives of GRADIENTS, in float64."""
    return differentiated(_copies(x), upstream, dtype=torch.float64, **options)


def eager(x, upstream=None, **options):
    """The same in float32 (float64 for float64), as it is usually written."""
    wide = torch.float64 if x["student"].dtype == torch.float64 else torch.float32
    return differentiated(_copies(x), upstream, dtype=wide, expanded=True, **options)


def _copies(x):
    return {k: v.detach().clone() for k, v in x.items()}


def assert_no_worse(got, want, own, what=""):
    """Each of loss and gradients within max(2 × PyTorch's own error, 4 units), relative to the
    largest number of it; 16-bit gradients besides by half a unit of each number. float64, which the
    truth is no better than, within 64 units.
    """
    assert len(got) == len(want) == len(own)
    for k, (x, exact, theirs) in enumerate(zip(got, want, own, strict=True)):
        assert x.shape == exact.shape, (what, k)
        size = exact.abs().max()
        own_error = ((theirs.double() - exact).abs().max() / size).nan_to_num(0)
        half = x.dtype in (torch.bfloat16, torch.float16)
        unit = torch.finfo(torch.float32 if half else x.dtype).eps
        units = 64 if x.dtype == torch.float64 else 4
        bound = oracle.SAMPLING * max(2 * own_error, units * unit) * size
        if half:
            bound = bound + exact.abs() * torch.finfo(x.dtype).eps / 2 + torch.finfo(x.dtype).tiny
        error = (x.double() - exact).abs()
        assert (error <= bound).all(), (
            f"{what}: result {k}: error {error.max():.3g} > {torch.as_tensor(bound).max():.3g}; "
            f"PyTorch's own {own_error * size:.3g}, size {size:.3g}"
        )
