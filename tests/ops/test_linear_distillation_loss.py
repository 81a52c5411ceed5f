"""linear_distillation_loss against distillation_loss of logits that exist, and what it must not do.

Shapes: N = 13 rows in chunks of 4 or 5, so that the last chunk is a short one; V = 67 and odd
widths that differ, so that no dimension can be taken for another.
"""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import ALL, DEFAULT, divergence, labels_for, logits
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels.ops import linear_distillation_loss as package
from kdkernels.ops.distillation_loss import row_options
from kdkernels.ops.linear_distillation_loss import reference

ROOT = Path(__file__).parents[2]
OP = torch.ops.kdkernels.linear_distillation_loss
N, V, HS, HT = 13, 67, 11, 7
PARTS = ("student_hidden", "student_weight", "student_bias")


def models(leading=(N,), vocab=V, dtype=torch.float64, teacher_vocab=None, widths=(HS, HT)):
    """Two models' hidden states, weights and biases: logits of standard deviation 2 or so."""
    of_teacher = vocab if teacher_vocab is None else teacher_vocab
    tensors = {}
    for seed, (whose, columns, width) in enumerate(
        zip(("student", "teacher"), (vocab, of_teacher), widths, strict=True)
    ):
        tensors[f"{whose}_hidden"] = logits(*leading, width, seed=seed, scale=1.0, dtype=dtype)
        weight = logits(columns, width, seed=seed + 2, scale=2 * width**-0.5, dtype=dtype)
        tensors[f"{whose}_weight"] = weight
        tensors[f"{whose}_bias"] = logits(columns, seed=seed + 4, scale=0.5, dtype=dtype)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def materialised(tensors, labels=None, *, chunk_rows=None, backend=None, **options):
    """The same by distillation_loss, of logits in float32 (float64)."""
    heads = {
        part: options.pop(part, default)
        for part, default in (
            ("student_softcap", None),
            ("teacher_softcap", None),
            ("student_logit_scale", 1.0),
            ("teacher_logit_scale", 1.0),
        )
    }

    def of(whose):
        if f"{whose}_logits" in tensors:
            return tensors[f"{whose}_logits"]
        hidden, weight, bias = (tensors.get(f"{whose}_{p}") for p in ("hidden", "weight", "bias"))
        up = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        z = hidden.to(up) @ weight.to(up).T + (0 if bias is None else bias.to(up))
        z = z * heads[f"{whose}_logit_scale"]
        cap = heads[f"{whose}_softcap"]
        return z if cap is None else cap * torch.tanh(z / cap)

    student = of("student")
    has_teacher = any(name.startswith("teacher") for name in tensors)
    teacher = of("teacher") if has_teacher else student.detach()
    return kdkernels.distillation_loss(student, teacher, labels, backend=backend, **options)


def fused(tensors, labels=None, **options):
    return kdkernels.linear_distillation_loss(**tensors, labels=labels, **options)


def gradients(loss, tensors, upstream=None):
    leaves = [x for x in tensors.values() if x.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return torch.autograd.grad(loss, leaves, upstream, allow_unused=True, retain_graph=True)


def assert_same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            scale = b.abs().max().item() or 1.0
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


class Watch(TorchDispatchMode):
    """Sees every op within the chunk loop: its products, and the largest tensor made.

    The loop must be called as a function, not through the dispatcher: see `watched`.
    """

    def __init__(self):
        super().__init__()
        self.flops, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "kdkernels::mm_float32_"):
            a, b = args[:2] if name == "aten::mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        given = {storage.data_ptr() for storage, _ in self._storages((args, kwargs))}
        for storage, itemsize in self._storages(result):
            if storage.data_ptr() not in given:
                self.largest = max(self.largest, storage.nbytes() // itemsize)
        return result

    @staticmethod
    def _storages(tree):
        leaves = torch.utils._pytree.tree_leaves(tree)
        return [(x.untyped_storage(), x.itemsize) for x in leaves if isinstance(x, torch.Tensor)]


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(package, "_op", reference.linear_distillation_loss)
    return Watch


# ---- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", ALL)
def test_every_divergence(name, parameters, backend):
    tensors, labels = models((N,)), torch.randint(V, (N,))
    options = dict(
        divergence=divergence(name, parameters), ce_weight=0.5, teacher_grad=True, backend=backend
    )
    got, want = fused(tensors, labels, chunk_rows=4, **options), None
    want = materialised(tensors, labels, **options)
    assert_same([got], [want], 1e-13)
    assert_same(gradients(got, tensors), gradients(want, tensors), 1e-11)


def _per_token(low, high):
    return low + (high - low) * torch.rand(N, dtype=torch.float64)


LEVELS = {
    "divergence": ["forward_kl", "jsd", "reverse_kl", "dkd", "tvd"],
    "reduction": ["batchmean", "sum", "mean", "none"],
    "masked": ["labels", "labels, not KD", "weights", "nothing", "everything"],
    "normalizer": [None, 7.5, "tensor"],
    "temperature": [1.0, 1.7, "tensor", "per token"],
    "teacher_temperature": [None, 0.8, "per token"],
    "t_squared": [True, False],
    "weights": ["numbers", "tensors", "per token", "no KD"],
    "label_smoothing": [0.0, 0.1],
    "bias": [True, False],
    "transform": ["none", "softcap", "scale", "both"],
    "vocab_size": [None, "padded"],
    "teacher": ["heads", "logits", "gradient", "gradient of logits"],
    "return_stats": [False, True],
    "chunk_rows": [None, 1, 5],
    "shape": ["flat", "sequence"],
}


def pairwise():
    """Cases that together hold every pair of levels of any two options."""
    names = list(LEVELS)
    left = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(LEVELS[a]))
        for y in range(len(LEVELS[b]))
    }
    rng, cases = random.Random(0), []
    while left:
        (a, x), (b, y) = min(left)
        best = None
        for _ in range(30):
            case = {name: rng.randrange(len(LEVELS[name])) for name in names} | {a: x, b: y}
            pairs = set(itertools.combinations(case.items(), 2))
            if best is None or len(pairs & left) > len(best[1]):
                best = case, pairs & left
        cases.append({name: LEVELS[name][level] for name, level in best[0].items()})
        left -= best[1]
    return cases


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case.values())))
def test_options_pairwise(case, backend):
    c = SimpleNamespace(**case)
    padded = c.vocab_size == "padded"
    tensors = models(vocab=V + 4 * padded, teacher_vocab=V + 9 * padded)
    labels = torch.randint(V, (N,))
    options = dict(
        divergence=c.divergence,
        reduction=c.reduction,
        t_squared=c.t_squared,
        label_smoothing=c.label_smoothing,
        return_stats=c.return_stats,
        teacher_grad=c.teacher.startswith("gradient"),
        vocab_size=V if padded else None,
        ce_weight=0.5,
        z_loss_weight=0.01,
        backend=backend,
    )
    scalar = dict(zip(("kd_weight", "ce_weight", "z_loss_weight"), (0.7, 0.5, 0.01), strict=True))
    if c.weights == "tensors":
        options |= {name: torch.tensor(x) for name, x in scalar.items()}
    elif c.weights == "per token":
        options |= {name: _per_token(0, 2 * x) for name, x in scalar.items()}
        options["kd_weight"][3] = 0
    elif c.weights == "no KD":
        options["kd_weight"] = 0.0
    if c.masked.startswith("labels"):
        labels[2:7] = -100
        options["mask_kd"] = c.masked == "labels" or c.divergence == "dkd"
    elif c.masked == "weights":
        options["token_weights"] = _per_token(0, 3)
        options["token_weights"][:4] = 0
    elif c.masked == "everything":
        labels[:] = -100
    if c.reduction in ("batchmean", "mean"):
        one = c.normalizer == "tensor"
        options["normalizer"] = torch.tensor(7.5) if one else c.normalizer
    for name in ("temperature", "teacher_temperature"):
        value = case[name]
        value = torch.tensor(1.3) if value == "tensor" else value
        options[name] = _per_token(0.5, 2) if isinstance(value, str) else value
    if not c.bias:
        del tensors["student_bias"], tensors["teacher_bias"]
    if c.teacher.endswith("logits"):
        tensors = {name: tensors[name] for name in PARTS if name in tensors}
        tensors["teacher_logits"] = logits(N, V + 9 * padded, dtype=torch.float64).requires_grad_()
    for whose in ("student", "teacher")[: 1 if c.teacher.endswith("logits") else 2]:
        if c.transform in ("softcap", "both"):
            options[f"{whose}_softcap"] = 3.0 if whose == "student" else 5.0
        if c.transform in ("scale", "both"):
            options[f"{whose}_logit_scale"] = 0.6
    if c.shape == "sequence":  # (1, N, ...)
        reach = {k for k, x in options.items() if isinstance(x, torch.Tensor) and x.dim()}
        options |= {name: options[name][None] for name in reach}
        labels = labels[None]
        tensors |= {
            name: x.detach()[None].requires_grad_()
            for name, x in tensors.items()
            if name.endswith(("hidden", "logits"))
        }

    got = fused(tensors, labels, chunk_rows=c.chunk_rows, **options)
    want = materialised(tensors, labels, **options)
    if c.return_stats:
        (got, got_stats), (want, want_stats) = got, want
        assert_same(got_stats, want_stats, 1e-11)
    assert_same([got], [want], 1e-11)
    upstream = logits(*got.shape, dtype=torch.float64, seed=9) if got.dim() else None
    mine, theirs = (gradients(x, tensors, upstream) for x in (got, want))
    # The teacher's bias has no gradient where KD is all there is of it; autograd says 0 or None.
    mine, theirs = ([torch.zeros(()) if x is None else x for x in g] for g in (mine, theirs))
    mine = [a if a.dim() else torch.zeros_like(b) for a, b in zip(mine, theirs, strict=True)]
    theirs = [b if b.dim() else torch.zeros_like(a) for a, b in zip(mine, theirs, strict=True)]
    assert_same(mine, theirs, 1e-10)


@pytest.mark.parametrize("dtypes", [("float32", 2e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_dtypes(dtypes, reduction, backend):
    """The loss is that of float32 logits; gradients differ by roundings to their own dtype."""
    name, tolerance = dtypes
    tensors, labels = models(dtype=getattr(torch, name)), torch.randint(V, (N,))
    options = dict(divergence="jsd", ce_weight=0.5, reduction=reduction, backend=backend)
    got, want = fused(tensors, labels, chunk_rows=5, **options), None
    want = materialised(tensors, labels, **options)
    assert got.dtype == torch.float32
    assert_same([got], [want], 1e-6)
    upstream = logits(N, seed=9) if reduction == "none" else torch.tensor(3.0)
    assert_same(gradients(got, tensors, upstream), gradients(want, tensors, upstream), tolerance)


def test_dtypes_of_one_model_may_differ(backend):
    """A float32 weight and bfloat16 hidden states: promoted, each gradient in its own dtype."""
    tensors = models(dtype=torch.float32)
    tensors["student_hidden"] = tensors["student_hidden"].detach().bfloat16().requires_grad_()
    tensors["teacher_hidden"] = tensors["teacher_hidden"].detach().double()
    got, want = (f(tensors, backend=backend) for f in (fused, materialised))
    assert got.dtype == torch.float64
    assert_same([got], [want], 1e-6)
    assert_same(gradients(got, tensors), gradients(want, tensors), 8e-3)


@pytest.mark.parametrize("name, parameters", DEFAULT)
def test_bfloat16_near_the_teacher(name, parameters):
    """Liger's losses: gradients 14 to 27 % off and a loss of −0.0052 on this case."""
    hidden = logits(32, 256, scale=1.0, dtype=torch.bfloat16, seed=1)
    weight = logits(8192, 256, scale=1 / 16, dtype=torch.bfloat16, seed=2)
    noise = logits(8192, 256, scale=0.03 / 16, seed=3)
    tensors = dict(
        student_hidden=hidden.requires_grad_(),
        student_weight=weight.requires_grad_(),
        teacher_hidden=hidden.detach().clone(),
        teacher_weight=(weight.detach() + noise).bfloat16(),
    )
    labels = labels_for(torch.empty(32, 8192))
    loss = fused(tensors, labels, divergence=name, chunk_rows=8)
    grads = gradients(loss, tensors)
    exact = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in tensors.items()}
    truth = materialised(exact, labels, divergence=name)
    assert loss.item() >= 0
    assert loss.item() == pytest.approx(truth.item(), rel=1e-3)
    for grad, true in zip(grads, gradients(truth, exact), strict=True):
        assert (grad - true).norm() < 0.003 * true.norm()


def test_weight_gradient_is_summed_in_float32():
    """Liger-Kernel #512, #827: 64 chunks added up in bfloat16 lose what they are added to."""
    tensors = models((64,), dtype=torch.bfloat16)
    exact = {k: x.detach().double().requires_grad_() for k, x in tensors.items()}
    by_weight = gradients(fused(tensors, chunk_rows=1, reduction="sum"), tensors)[1]
    true = gradients(materialised(exact, reduction="sum"), exact)[1]
    assert (by_weight - true).norm() < 0.003 * true.norm()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "dkd"])
def test_gradcheck(name, reduction, backend):
    """All seven gradients against finite differences."""
    tensors = models((3,), vocab=5, widths=(2, 3))
    labels = torch.tensor([3, 0, 1])
    options = dict(
        divergence=name,
        reduction=reduction,
        teacher_grad=True,
        ce_weight=0.5,
        z_loss_weight=0.01,
        student_softcap=4.0,
        teacher_logit_scale=0.8,
        temperature=1.3,
        chunk_rows=2,
        backend=backend,
    )
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *xs: fused(dict(zip(names, xs, strict=True)), labels, **options),
        tuple(tensors.values()),
    )
    given = logits(3, 5, dtype=torch.float64).requires_grad_()
    del options["teacher_logit_scale"]
    student = [tensors[name] for name in PARTS]
    assert torch.autograd.gradcheck(
        lambda given, *xs: fused(
            dict(zip(PARTS, xs, strict=True)) | {"teacher_logits": given}, labels, **options
        ),
        (given, *student),
    )


@pytest.mark.parametrize("chunk_rows", [1, 3, N, N + 5])
def test_chunk_size_changes_rounding_only(chunk_rows, backend):
    tensors, labels = models(), torch.randint(V, (N,))
    options = dict(ce_weight=0.5, reduction="none", backend=backend)
    got, want = (fused(tensors, labels, chunk_rows=c, **options) for c in (chunk_rows, None))
    assert_same([got], [want], 1e-13)
    assert_same(gradients(got, tensors), gradients(want, tensors), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype, backend):
    """Bitwise, where the chunks have the same shape."""
    tensors = {k: x.detach() for k, x in models((12,), dtype=dtype).items()}
    options = dict(reduction="none", chunk_rows=4, backend=backend)
    one = fused(tensors, **options)
    for whose in ("student_hidden", "teacher_hidden"):
        tensors[whose] = tensors[whose].clone()
        tensors[whose][5:] += 1
    assert torch.equal(one[:5], fused(tensors, **options)[:5])


def test_twice_the_same(backend):
    tensors = models(dtype=torch.bfloat16)
    losses = [fused(tensors, chunk_rows=4, backend=backend) for _ in range(2)]
    assert torch.equal(*losses)
    for a, b in zip(*(gradients(loss, tensors) for loss in losses), strict=True):
        assert a is b is None or torch.equal(a, b)


# ---- memory and products -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("teacher", ["heads", "gradient", "logits", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_of_all_logits_is_allocated(dtype, teacher, reduction, watched, backend):
    """N·V is 6 times the largest tensor made: hidden
    states or a chunk."""
    tensors = models((2, 200), dtype=dtype)
    if teacher in ("logits", "none"):
        tensors = {name: tensors[name] for name in PARTS}
    if teacher == "logits":
        # Leading dimensions that flatten to no single stride, and the wrong dimension contiguous.
        tensors["teacher_logits"] = logits(V, 2, 201, dtype=dtype).permute(1, 2, 0)[:, 1:]
    labels = labels_for(torch.empty(2, 200, V))
    labels[:, :50] = -100
    options = dict(
        ce_weight=0.5,
        kd_weight=float(teacher != "none"),
        student_softcap=3.0,
        temperature=1 + torch.rand(2, 200),
        teacher_grad=teacher == "gradient",
        return_stats=True,
        reduction=reduction,
        chunk_rows=20,
        backend=backend,
    )
    with watched() as watch:
        loss, _ = fused(tensors, labels, **options)
        loss.sum().backward()
    assert 400 * HS <= watch.largest < 400 * V / 5


PEAK = """
import ctypes, torch, kdkernels

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field + ":"))

def step(n, v):
    hidden = torch.randn(n, 64).requires_grad_()
    weight = torch.randn(v, 64).requires_grad_()
    teacher, head = torch.randn(n, 32), torch.randn(v, 32)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = status("VmRSS")
    loss = kdkernels.linear_distillation_loss(
        hidden, weight, teacher, head, memory_budget=8 * 2**20
    )
    loss.backward()
    return status("VmHWM") - before

torch.set_num_threads(1)
step(8, 64)
print(step(4096, 16384))
"""


def test_peak_memory():
    """All logits of one model would be 256 MiB. Allowed: the budget of 8 MiB, the weight's gradient
    twice (5 MiB each: kept, and handed out), and the hidden states' twice (1 MiB).
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        cwd=ROOT,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 * 2**20


def test_memory_budget_sets_the_chunk(monkeypatch):
    """8 bytes a logit of two float32 heads; 4 more with a softcap; for two bfloat16 heads 2 and, in
    a fourth of the chunk at a time, 8.
    """
    seen = []
    monkeypatch.setattr(
        package, "_op", lambda *a: seen.append(a[13]) or reference.linear_distillation_loss(*a)
    )
    tensors = models(dtype=torch.float32)
    for budget, options in ((8 * V * 3, {}), (12 * V * 3, {"student_softcap": 2.0}), (1, {})):
        fused(tensors, memory_budget=budget, **options)
    fused(models(dtype=torch.bfloat16), memory_budget=4 * V * 3)
    assert seen == [3, 3, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "frozen, per_token, floor",
    [
        ((), False, 3 * HS + HT),
        (("student_weight", "student_bias"), False, 2 * HS + HT),
        (("student_hidden",), False, 2 * HS + HT),
        (("student_hidden", "student_weight"), False, HS + HT),  # a bias takes no product
        (PARTS, False, HS + HT),
        ((), True, 4 * HS + 2 * HT),
        (("student_weight",), True, 3 * HS + 2 * HT),
    ],
)
def test_no_product_is_done_in_vain(dtype, frozen, per_token, floor, watched):
    tensors = models(dtype=dtype)
    for name in frozen:
        tensors[name].requires_grad_(False)
    with watched() as watch:
        loss = fused(tensors, chunk_rows=4, reduction="none" if per_token else "batchmean")
        if loss.requires_grad:
            loss.sum().backward()
    assert watch.flops == 2 * N * V * floor


def test_no_grad_is_forward_only(watched):
    tensors = models()
    with watched() as watch, torch.no_grad():
        loss = fused(tensors)
    assert watch.flops == 2 * N * V * (HS + HT) and not loss.requires_grad


@pytest.mark.parametrize("how", ["labels", "token_weights", "kd_weight", "upstream"])
def test_masked_rows_cost_no_product(how, watched):
    """Four of 13 rows count. An upstream factor of 0 masks the backward."""
    tensors, keep = models(), torch.tensor([0, 5, 6, 12])
    counts = torch.zeros(N).index_fill(0, keep, 1.0)
    options = {}
    if how == "labels":
        options["labels"] = torch.where(counts > 0, 3, -100)
    elif how != "upstream":
        options[how] = counts
    with watched() as watch:
        if how == "upstream":
            fused(tensors, reduction="none").backward(counts.double())
            assert watch.flops == 2 * V * (N * (HS + HT) + 4 * (3 * HS + HT))
        else:
            fused(tensors, chunk_rows=3, **options).backward()
            assert watch.flops == 2 * 4 * V * (3 * HS + HT)
    by_hidden = tensors["student_hidden"].grad
    assert (by_hidden[counts == 0] == 0).all() and (by_hidden[keep] != 0).any(1).all()


def test_without_kd_the_teacher_costs_no_product(watched):
    """Given or not, and then the loss is a fused linear cross-entropy."""
    labels = torch.randint(V, (N,))
    for tensors in (models(), {name: x for name, x in models().items() if name in PARTS}):
        with watched() as watch:
            loss = fused(tensors, labels, kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1)
            loss.backward()
        assert watch.flops == 2 * N * V * 3 * HS
        student = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        z = torch.nn.functional.linear(*(student[name] for name in PARTS))
        want = torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1)
        torch.testing.assert_close(loss, want)
        for name, grad in zip(
            PARTS, torch.autograd.grad(want, [student[p] for p in PARTS]), strict=True
        ):
            torch.testing.assert_close(tensors[name].grad, grad)


def test_statistics_without_a_teacher():
    tensors = {name: x for name, x in models().items() if name in PARTS}
    labels = torch.randint(V, (N,))
    _, stats = fused(tensors, labels, kd_weight=0, ce_weight=1.0, return_stats=True)
    _, want = materialised(tensors, labels, kd_weight=0, ce_weight=1.0, return_stats=True)
    assert_same(
        (stats.ce, stats.student_entropy, stats.label_log_prob),
        (want.ce, want.student_entropy, want.label_log_prob),
        1e-12,
    )
    for name in ("kd", "teacher_entropy", "top1_agreement"):
        assert (getattr(stats, name) == 0).all()


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 4),
        (1, 1, 1),
        (2, 3000, 2),
        (2, 2, 3000),
        (2100, 3, 2),
        # AMX: tiles of 16 rows, depths of 32 and panels of 64 columns, the last of each partly
        (37, 70, 150),
        (64, 64, 128),
    ],
)
def test_bfloat16_product(shape, implementation):
    """Rows or columns contiguous, strided, and added to; the large sizes cross a tile's end."""
    m, k, n = shape
    product = reference.mm_float32_
    if implementation == "cpp":
        product = torch.ops.kdkernels.mm_float32_

    def matrix(rows, columns, layout, seed):
        x = logits(*((rows, 2 * columns) if layout != "columns" else (columns, rows)), seed=seed)
        x = x.bfloat16()
        return x.t() if layout == "columns" else x[:, :columns]

    for a_layout, b_layout in itertools.product(("rows", "columns"), repeat=2):
        a, b = matrix(m, k, a_layout, 1), matrix(k, n, b_layout, 2)
        out = torch.full((m, n + 3), 7.0)
        want = a.double() @ b.double()
        product(out[:, :n], a, b, False)
        torch.testing.assert_close(out[:, :n].double(), want, rtol=1e-5, atol=1e-3)
        product(out[:, :n], a, b, True)
        torch.testing.assert_close(out[:, :n].double(), 2 * want, rtol=1e-5, atol=1e-3)
        assert (out[:, n:] == 7).all()


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])  # stored block by block, and at the end
def test_gradient_rounded_by_the_row_kernel(name):
    """The float32 gradient, rounded; into rows with a gap, and three blocks of columns long."""
    student, teacher = logits(5, 5000, seed=1), logits(5, 5000, seed=2)
    labels = torch.randint(5000, (5,))
    labels[2] = -100
    options = row_options(
        labels, (5,), 5000, student.device, torch.float32, divergence=name, ce_weight=0.5
    )
    wide = torch.full((5, 5003), 7.0, dtype=torch.bfloat16)
    into = wide[:, :5000]
    op = torch.ops.kdkernels.distillation_loss_and_grad_into
    loss, rows, _ = op(student, teacher, *options, False, into)
    want_loss, want_rows, want, _ = torch.ops.kdkernels.distillation_loss_and_grad(
        student, teacher, *options, False
    )
    assert torch.equal(loss, want_loss) and torch.equal(rows, want_rows)
    assert torch.equal(into, want.bfloat16()) and (wide[:, 5000:] == 7).all()
    torch.library.opcheck(op, (student, teacher, *options, False, into))
    with pytest.raises(RuntimeError, match="grad must have the student's rows and columns"):
        op(student, teacher, *options, False, into[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5000), (0, 4), (7,)])
def test_scaled(shape, dtype):
    """Rounded once, and what is 0 stays 0: a masked row, where a GradScaler's factor overflowed."""
    grad = logits(*shape, seed=1)
    grad[..., ::3] = 0
    scaled = torch.ops.kdkernels.scaled
    for factor in (1.0, 0.3, float("inf")):
        by = torch.tensor(factor)
        want = torch.where(grad == 0, 0.0, grad * by).to(dtype)
        for implementation in (scaled, reference.scaled):
            got = implementation(grad, by, dtype)
            assert got.dtype == dtype and torch.equal(got, want)
    turned = scaled(grad.t(), torch.tensor(2.0, dtype=torch.float64), torch.float32)
    assert turned.is_contiguous() and torch.equal(turned, grad.t() * 2)


# ---- autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_two_backwards(reduction, backend):
    """Liger-Kernel and flash-linear-attention scale their kept gradients in place: the second
    backward doubles them.
    """
    tensors = models()
    loss = fused(tensors, reduction=reduction, chunk_rows=5, backend=backend)
    want = materialised(tensors, reduction=reduction)
    for seed in (1, 2, 1):
        upstream = logits(*loss.shape, seed=seed, dtype=torch.float64)
        assert_same(gradients(loss, tensors, upstream), gradients(want, tensors, upstream), 1e-11)


def test_the_inputs_survive(backend):
    tensors = models(dtype=torch.bfloat16)
    before = {name: x.detach().clone() for name, x in tensors.items()}
    fused(tensors, student_softcap=3.0, student_logit_scale=0.5, backend=backend).backward()
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())


def test_the_teacher_is_detached_unless_asked_for():
    tensors = models()
    grads = gradients(fused(tensors), tensors)
    assert [x is None for x in grads] == [False] * 3 + [True] * 3
    for x in list(tensors.values())[:3]:
        x.requires_grad_(False)
    assert not fused(tensors).requires_grad
    assert fused(tensors, teacher_grad=True).requires_grad


@pytest.mark.parametrize("teacher_grad", [False, True])
def test_tied_weights(teacher_grad, backend):
    tensors = models(widths=(HS, HS))
    tensors["teacher_weight"] = tensors["student_weight"]
    options = dict(divergence="jsd", teacher_grad=teacher_grad, backend=backend)
    got, want = (f(tensors, **options) for f in (fused, materialised))
    for loss in (got, want):
        loss.backward()
        loss.grads = [x.grad for x in list(tensors.values())[:2]]
        for x in tensors.values():
            x.grad = None
    assert_same(got.grads, want.grads, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("view", ["slice", "transposed", "every other", "expanded"])
def test_weights_that_are_views(view, dtype, backend):
    """Part of a larger parameter, an embedding kept the other way round, rows with a gap, and rows
    that are one row.
    """
    tensors = models(dtype=dtype)
    base = {
        "slice": logits(V + 9, HS + 2, seed=3, dtype=dtype),
        "transposed": logits(HS, V, seed=3, dtype=dtype),
        "every other": logits(V, 2 * HS, seed=3, dtype=dtype),
        "expanded": logits(1, HS, seed=3, dtype=dtype),
    }[view].requires_grad_()
    tensors["student_weight"] = {
        "slice": lambda: base[4 : V + 4, 1 : HS + 1],
        "transposed": lambda: base.t(),
        "every other": lambda: base[:, ::2],
        "expanded": lambda: base.expand(V, HS),
    }[view]()
    # With z-loss: the other terms' gradients add up to 0 over the columns, and so would one row's.
    options = dict(z_loss_weight=0.1, backend=backend)
    got, want = (f(tensors, chunk_rows=5, **options) for f in (fused, materialised))
    assert_same([got], [want], 1e-6 if dtype == torch.bfloat16 else 1e-13)
    mine, theirs = (gradients(x, {"base": base}) for x in (got, want))
    assert_same(mine, theirs, 1e-2 if dtype == torch.bfloat16 else 1e-11)


def test_hidden_states_that_are_views(backend):
    """hidden[:, :-1], the usual shift, and a transposed batch."""
    tensors = models((4, 5))
    labels = labels_for(torch.empty(4, 4, V))
    shifted = {name: x[:, :-1] if name.endswith("hidden") else x for name, x in tensors.items()}
    got, want = (f(shifted, labels, ce_weight=1.0, backend=backend) for f in (fused, materialised))
    assert_same(gradients(got, tensors), gradients(want, tensors), 1e-11)
    turned = {
        name: x.transpose(0, 1) if name.endswith("hidden") else x for name, x in tensors.items()
    }
    got, want = (f(turned, backend=backend) for f in (fused, materialised))
    assert_same(gradients(got, tensors), gradients(want, tensors), 1e-11)


def test_checkpoint(backend):
    tensors = models()
    names = list(tensors)

    def loss(*xs):
        return fused(dict(zip(names, xs, strict=True)), chunk_rows=5, backend=backend)

    got = checkpoint(loss, *tensors.values(), use_reentrant=False)
    assert_same(gradients(got, tensors), gradients(loss(*tensors.values()), tensors), 0)


def test_double_backward_raises(backend):
    tensors = models()
    loss = fused(tensors, backend=backend)
    (grad,) = torch.autograd.grad(loss, tensors["student_hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_autocast(backend):
    """float32 parameters: rounded to bfloat16 for their products, as nn.Linear does, and the logits
    are float32 all the same; the gradients arrive in float32.
    """
    tensors = models(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(tensors, divergence="jsd", chunk_rows=5, backend=backend)
    rounded = {
        name: x if name.endswith("bias") else x.bfloat16().float() for name, x in tensors.items()
    }
    want = materialised(rounded, divergence="jsd")
    assert_same([got], [want], 1e-6)
    mine = gradients(got, tensors)
    assert all(grad.dtype == torch.float32 for grad in mine if grad is not None)
    assert_same(mine, gradients(want, tensors), 8e-3)


def test_no_rows_and_nothing_counted(backend):
    """A loss of 0 with a graph, gradients of 0."""
    empty, masked = models((0,)), models()
    for tensors, labels in (
        (empty, torch.zeros(0, dtype=torch.int64)),
        (masked, torch.full((N,), -100)),
    ):
        loss = fused(tensors, labels, ce_weight=1.0, backend=backend)
        loss.backward()
        assert loss.item() == 0
        assert all((tensors[name].grad == 0).all() for name in PARTS)


def test_masked_rows_leak_nothing(backend):
    """0·NaN, as TRL multiplies by its mask; and more chunks than rows that count, where Liger's
    CuTe kernel let ignored rows through.
    """
    tensors, labels = models(), torch.full((N,), -100)
    labels[7] = 3
    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            tensors[name][torch.arange(N) != 7] = torch.nan
    loss = fused(tensors, labels, ce_weight=0.5, chunk_rows=2, backend=backend)
    loss.backward()
    only = {
        name: (x[7:8] if name.endswith("hidden") else x).detach().requires_grad_()
        for name, x in tensors.items()
    }
    want = materialised(only, labels[7:8], ce_weight=0.5)
    assert_same([loss], [want], 1e-13)
    grads = gradients(want, only)
    assert_same([tensors["student_weight"].grad], grads[1:2], 1e-12)
    assert_same([tensors["student_hidden"].grad[7:8]], grads[:1], 1e-12)
    assert (tensors["student_hidden"].grad[torch.arange(N) != 7] == 0).all()


def test_padding_is_not_a_logit_of_zero(backend):
    """Liger pads the smaller vocabulary with zeros, which take part in the softmax."""
    tensors = models(vocab=V, teacher_vocab=V + 60)
    loss = fused(tensors, vocab_size=V, backend=backend)
    cut = {
        name: x[:V] if name.startswith("teacher_") and name[8:] != "hidden" else x
        for name, x in tensors.items()
    }
    assert_same([loss], [materialised(cut)], 1e-13)
    tensors = models(vocab=V + 60)
    loss = fused(tensors, vocab_size=V, backend=backend)
    loss.backward()
    for part in ("student_weight", "student_bias"):
        assert (tensors[part].grad[V:] == 0).all() and (tensors[part].grad[:V] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_total_variation_of_a_student_that_is_its_teacher(dtype, backend):
    """Liger-Kernel #1373: a gradient of -1/2 at ties, all of them in self-distillation."""
    tensors = models(dtype=dtype, widths=(HS, HS))
    for part in PARTS:
        tensors[part.replace("student", "teacher")] = tensors[part].detach()
    loss = fused(tensors, divergence="tvd", chunk_rows=5, backend=backend)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(loss, tensors))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "reverse_kl", "tvd"])
def test_suppressed_tokens_and_a_low_temperature(name, backend):
    """TRL #5594, Liger-Kernel #1453: NaN gradients where both heads' biases suppress a token with
    -inf, and where both probabilities underflow (T = 0.05).
    """
    tensors = models(dtype=torch.float32)
    with torch.no_grad():
        for whose in ("student", "teacher"):
            tensors[f"{whose}_bias"][5:9] = -torch.inf
    options = dict(divergence=name, chunk_rows=5, backend=backend)
    for temperature in (0.05, 1.0):
        got = fused(tensors, temperature=temperature, **options)
        mine = gradients(got, tensors)
        assert got.isfinite() and all(grad.isfinite().all() for grad in mine if grad is not None)
    want = materialised(tensors, **options)
    assert_same([got], [want], 1e-5)
    assert_same(mine, gradients(want, tensors), 1e-5)


def test_float16_gradient_survives_until_the_upstream_factor(backend):
    """A GradScaler's factor: gradients of 1e-9 are not float16 numbers, 65536 times them are."""
    tensors = models(dtype=torch.float16)
    loss = fused(tensors, normalizer=1e6, backend=backend)
    want = materialised(tensors, normalizer=1e6, backend=backend)
    factor = torch.tensor(65536.0)
    assert_same(gradients(loss, tensors, factor)[:2], gradients(want, tensors, factor)[:2], 2e-3)


def test_data_parallel(backend, tmp_path):
    """DDP's hooks see one gradient a parameter, and the same one as without it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        head, teacher = nn.Linear(HS, V), nn.Linear(HT, V)
        body = nn.Linear(5, HS)
        loss = kdkernels.LinearDistillationLoss(head, teacher, backend=backend)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = body, head

            def forward(self, x, of_teacher):
                return loss(self.body(x), of_teacher)

        model = Model()
        batch = torch.randn(N, 5), torch.randn(N, HT)
        want = torch.autograd.grad(model(*batch), list(model.parameters()))
        nn.parallel.DistributedDataParallel(model)(*batch).backward()
        for parameter, grad in zip(model.parameters(), want, strict=True):
            assert torch.equal(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


# ---- compiled ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_one_node_of_a_full_graph(reduction, fresh_dynamo):
    """fullgraph=True, and beneath it neither a product nor a second op in the forward."""
    tensors, labels = models(), torch.randint(V, (N,))
    names, graphs = list(tensors), []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op[:4] == "call"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep)

    def loss(*xs):
        return fused(
            dict(zip(names, xs, strict=True)),
            labels,
            ce_weight=0.5,
            reduction=reduction,
            chunk_rows=5,
            student_softcap=3.0,
        )

    got = torch.compile(loss, fullgraph=True, backend=backend)(*tensors.values())
    want = loss(*tensors.values())
    upstream = logits(*got.shape, dtype=torch.float64)
    assert_same([got], [want], 1e-12)
    assert_same(gradients(got, tensors, upstream), gradients(want, tensors, upstream), 1e-12)
    forward = graphs[0]
    assert sum("linear_distillation_loss" in target for target in forward) == 1
    assert not any("mm" in target for graph in graphs for target in graph)


def test_the_module_and_autocast_compiled(fresh_dynamo):
    heads = nn.Linear(HS, V), nn.Linear(HT, V, bias=False)
    loss = kdkernels.LinearDistillationLoss(*heads, divergence="jsd")
    hidden = torch.randn(2, 5, HS, requires_grad=True), torch.randn(2, 5, HT)
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got, want = step(*hidden), loss(*hidden)
        torch.testing.assert_close(got, want)
        leaves = hidden[0], heads[0].weight, heads[0].bias
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_number_of_rows_compiles_once_more(dtype, fresh_dynamo):
    """For the first shape, then for any."""
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(fused, fullgraph=True, backend=counter)
    for rows in (5, 8, 13, 21):
        tensors = models((rows,), dtype=dtype)
        assert_same([step(tensors)], [fused(tensors)], 1e-12 if dtype == torch.float64 else 1e-6)
    assert counter.frame_count == 2


def test_opcheck(backend):
    tensors = {name: x.detach() for name, x in models(dtype=torch.bfloat16).items()}
    calls = []

    def record(*args):
        calls.append(args)
        return OP(*args)

    original, package._op = package._op, record
    try:
        labels = torch.randint(V, (N,))
        labels[3] = -100
        for reduction in ("batchmean", "none"):
            leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
            loss, _ = fused(
                leaves,
                labels,
                ce_weight=0.5,
                return_stats=True,
                teacher_grad=True,
                reduction=reduction,
                backend=backend,
            )
            loss.sum().backward()
        student = {name: tensors[name] for name in PARTS}
        given = {"teacher_logits": logits(N, V).requires_grad_()}
        fused(student | given, teacher_grad=True, backend=backend)
    finally:
        package._op = original
    assert len(calls) == 4
    for args in calls:
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(OP, plain)
    a, b = logits(3, 5).bfloat16(), logits(5, 4).bfloat16()
    torch.library.opcheck(torch.ops.kdkernels.mm_float32_, (torch.zeros(3, 4), a, b, True))
    scaled = torch.ops.kdkernels.scaled
    torch.library.opcheck(scaled, (logits(3, 5), torch.tensor(2.0), torch.bfloat16))


# ---- the module --------------------------------------------------------------------------------


def test_module():
    student, teacher = nn.Linear(HS, V), nn.Linear(HT, V, bias=False)
    loss = kdkernels.LinearDistillationLoss(student, teacher, temperature=2.0, divergence="jsd")
    hidden, of_teacher = torch.randn(2, 5, HS), torch.randn(2, 5, HT)
    labels = torch.randint(V, (2, 5))
    got = loss(hidden, of_teacher, labels, ce_weight=0.5, temperature=1.5)
    want = kdkernels.distillation_loss(
        student(hidden),
        teacher(of_teacher),
        labels,
        divergence="jsd",
        ce_weight=0.5,
        temperature=1.5,
    )
    torch.testing.assert_close(got, want)
    got.backward()
    assert student.weight.grad is not None and teacher.weight.grad is None
    assert not list(loss.parameters()) and not loss.state_dict()
    given = loss(hidden, teacher_logits=teacher(of_teacher))
    torch.testing.assert_close(given, loss(hidden, of_teacher))
    assert "temperature=2.0" in repr(loss) and "out_features=67" in repr(loss)


class LoRA(nn.Linear):
    """An adapter as TRL #4612 and Liger pass it by: the weight is not what is computed."""

    def forward(self, x):
        return super().forward(x) + 1


def test_heads_that_are_more_than_their_weight():
    plain = nn.Linear(HT, V)
    hooked, patched = nn.Linear(HS, V), nn.Linear(HS, V)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    patched.forward = lambda x: x
    quantised = torch.ao.nn.quantized.dynamic.Linear(HS, V)
    for head, text in (
        (LoRA(HS, V), "LoRA"),
        (nn.Sequential(nn.Linear(HS, V)), "Sequential"),
        (quantised, "quantized"),
        (hooked, "hooks"),
        (patched, "forward"),
    ):
        with pytest.raises(TypeError, match=f"(?s)student_head.*{text}"):
            kdkernels.LinearDistillationLoss(head, plain)
    later = nn.Linear(HS, V)
    loss = kdkernels.LinearDistillationLoss(later, plain)
    later.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(TypeError, match="student_head.*hooks"):
        loss(torch.randn(3, HS), torch.randn(3, HT))


class Shards(torch.Tensor):
    """A tensor subclass, as quantised weights are."""


def test_weights_that_are_more_than_a_tensor():
    head = nn.Linear(HS, V)
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Shards))
    with pytest.raises(TypeError, match="student_head.weight is a Shards"):
        kdkernels.LinearDistillationLoss(head, nn.Linear(HT, V))


def test_a_parametrised_head_is_its_effective_weight():
    head = torch.nn.utils.parametrizations.weight_norm(nn.Linear(HS, V))
    teacher, hidden, of_teacher = nn.Linear(HT, V), torch.randn(3, HS), torch.randn(3, HT)
    got = kdkernels.LinearDistillationLoss(head, teacher)(hidden, of_teacher)
    want = kdkernels.distillation_loss(head(hidden), teacher(of_teacher))
    for a, b in zip(
        *(torch.autograd.grad(x, list(head.parameters())) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b)


# ---- refusals ----------------------------------------------------------------------------------

M = {name: x.detach() for name, x in models().items()}


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(student_hidden=[1.0]), TypeError, "student_hidden is a list"),
        (dict(student_weight=M["student_weight"].int()), TypeError, "student_weight has dtype"),
        (dict(student_weight=torch.zeros(V, 5)), ValueError, r"student_weight.*\(67, 5\).*11"),
        (dict(teacher_weight=None), TypeError, "teacher_weight is a NoneType"),
        (dict(teacher_hidden=None), ValueError, "teacher_weight without teacher_hidden"),
        (dict(teacher_hidden=torch.zeros(4, HT)), ValueError, r"teacher_hidden.*\(4, 7\).*\(13,\)"),
        (dict(student_bias=torch.zeros(3)), ValueError, r"student_bias has shape \(3,\).*\(67,\)"),
        (dict(teacher_logits=torch.zeros(N, V)), ValueError, "teacher_hidden and teacher_logits"),
        (dict(teacher_hidden=None, teacher_weight=None, teacher_bias=None), ValueError, "neither"),
        (dict(teacher_weight=torch.zeros(70, HT), teacher_bias=None), ValueError, "vocab_size="),
        (dict(vocab_size=68), ValueError, "vocab_size=68.*1 to the 67"),
        (dict(vocab_size=3.0), TypeError, "vocab_size is a float"),
        (dict(chunk_rows=0), ValueError, "chunk_rows=0"),
        (dict(chunk_rows=2.5), TypeError, "chunk_rows is a float"),
        (dict(chunk_rows=4, memory_budget=9), ValueError, "chunk_rows and memory_budget"),
        (dict(memory_budget=-1), ValueError, "memory_budget=-1"),
        (dict(student_softcap=0.0), ValueError, "student_softcap=0"),
        (dict(teacher_softcap="3"), TypeError, "teacher_softcap is a str"),
        (dict(student_logit_scale=float("nan")), ValueError, "student_logit_scale=nan"),
        (dict(teacher_logit_scale=None), TypeError, "teacher_logit_scale is a NoneType"),
        (dict(teacher_grad=1), TypeError, "teacher_grad is a int"),
        (dict(inplace=True), TypeError, "got 'inplace'; accepted:.*divergence"),
        (dict(temprature=2.0), TypeError, "got 'temprature'"),
        (dict(reduction="avg"), ValueError, "reduction='avg'"),
        (dict(ce_weight=1.0), ValueError, r"labels is None.*\(13,\)"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), ValueError, r"labels has shape \(3,\)"),
        (dict(backend="tpu"), ValueError, "backend='tpu'"),
        (dict(student_weight=torch.zeros(V, HS, device="meta")), ValueError, "on meta.*cpu"),
    ],
)
def test_errors(change, error, text):
    with pytest.raises(error, match=text):
        kdkernels.linear_distillation_loss(**{**M, **change})


def test_teacher_transform_of_given_logits():
    student = {name: M[name] for name in PARTS}
    with pytest.raises(ValueError, match="teacher_softcap or teacher_logit_scale"):
        fused(student | {"teacher_logits": torch.zeros(N, V)}, teacher_softcap=3.0)


def test_label_out_of_range(backend):
    """Its number among all rows, though it is in a later chunk and behind masked ones."""
    labels = torch.randint(V, (N,))
    labels[2], labels[11] = -100, V
    with pytest.raises(IndexError, match=r"labels\[11\] is 67; accepted: 0 to 66"):
        fused(M, labels, ce_weight=1.0, chunk_rows=2, backend=backend)


def test_signature_has_every_option():
    import inspect

    mine = inspect.signature(kdkernels.linear_distillation_loss).parameters
    theirs = inspect.signature(kdkernels.distillation_loss).parameters
    absent = {"inplace", "standardize", "teacher_center"}  # these act on whole rows of given logits
    for name in list(theirs)[2:]:
        assert (name in mine) == (name not in absent)
        if name in mine:
            assert mine[name].default == theirs[name].default
