"""linear_distillation_loss's chunks as CUDA tensors go through them, without a GPU."""

import contextlib

import pytest
import torch
from low_memory import models
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.ops import linear_distillation_loss as package
from kdkernels.ops.linear_distillation_loss import reference


class Products(TorchDispatchMode):
    """Notes the matrix products: (overload, dtypes of the operands and of the result)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            given = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.found.append((func._overloadname, *(x.dtype for x in given), result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_cublas_with_a_float32_result(dtype, monkeypatch):
    """On meta tensors, which take CUDA's way: whether the overloads take what they are given.

    float16's gradient stays float32: its products are converted a tile at a time.
    """
    calls = []

    def noted(*args):
        calls.append(args)
        return reference.linear_distillation_loss(*args)

    monkeypatch.setattr(package, "_op", noted)
    tensors = models(9, 20, (8, 16), dtype, bias=False)
    loss = kdkernels.linear_distillation_loss(**tensors, chunk_rows=5, backend="reference")
    # There is no autocast for meta tensors to be switched off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with Products() as products:
        reference.linear_distillation_loss(
            *(x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in calls[0])
        )
    assert loss.requires_grad
    half = (dtype, dtype, torch.float32)
    logits = [("dtype_out", *half)] * 2
    if dtype == torch.bfloat16:
        # bfloat16 hidden states' gradient is what torch.mm gives.
        chunk = [*logits, ("out", dtype, dtype, dtype), ("dtype_out", *half)]
        assert products.found == [*chunk, *chunk]
    else:
        assert [p for p in products.found if p[1] == dtype] == logits * 2


def test_low_memory_where_no_useful_chunk_fits(monkeypatch):
    """20 columns of 4 + 4 bytes: 128 rows take 20480 bytes. Not where chunk_rows is given."""
    taken = []

    def apply(tensors, transforms, budget, row):
        taken.append(budget)
        return torch.zeros(()), None

    monkeypatch.setattr(package.logit_free, "serves", lambda device, dtypes, backend: True)
    monkeypatch.setattr(package.logit_free, "apply", apply)
    tensors = models(9, 20, (8, 16), bias=False)
    for options in (dict(memory_budget=20480), dict(chunk_rows=2), dict()):
        kdkernels.linear_distillation_loss(**tensors, **options)
    assert not taken
    kdkernels.linear_distillation_loss(**tensors, memory_budget=20479)
    assert taken == [20479]


def test_2048_rows_a_chunk_unless_told():
    cuda = torch.device("cuda")
    assert package._chunk_rows(None, None, 10 * 128256, cuda) == 2048
    assert package._chunk_rows(None, 2**30, 10 * 128256, cuda) == 2**30 // (10 * 128256)
    assert package._chunk_rows(7, None, 10 * 128256, cuda) == 7


def test_nan_of_a_masked_row_stays_there(monkeypatch):
    """Where rows are not left out, for which the host would have to wait, they go through every
    product.
    """
    monkeypatch.setattr(reference, "_leaves_out", lambda device: False)
    monkeypatch.setattr(package, "_op", reference.linear_distillation_loss)
    tensors = models(9, 20, (8, 16))
    labels = torch.arange(9)
    labels[4] = -100

    def run(**changed):
        given = {**tensors, **changed}
        loss = kdkernels.linear_distillation_loss(
            **given, labels=labels, chunk_rows=5, ce_weight=0.5, teacher_grad=True
        )
        return loss, *torch.autograd.grad(loss, list(given.values()))

    want = run()
    spoilt = {}
    for name in ("student_hidden", "teacher_hidden"):
        x = tensors[name].detach().clone()
        x[4] = torch.nan
        spoilt[name] = x.requires_grad_()
    for got, expected in zip(run(**spoilt), want, strict=True):
        assert torch.equal(got, expected)
