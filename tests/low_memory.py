"""linear_distillation_loss(low_memory=True) against float64: the checks of test_triton_linear.py.

As a program (``TRITON_INTERPRET=1 python tests/low_memory.py``) it makes them for every
divergence in Triton's interpreter, which runs kernels in NumPy: no code to translate, but float32
only, as it truncates bfloat16.
"""

import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import oracle
from cases import divergence, labels_for, logits

import kdkernels
from kdkernels.divergences import DIVERGENCES

NAMES = ("student_hidden", "student_weight", "student_bias",
         "teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits")  # fmt: skip


def models(n, vocab, widths, dtype=torch.float32, *, bias=True, teacher="hidden", padding=0):
    """Logits of standard deviation 2 or so. `padding`: rows of the teacher's weight past vocab."""
    tensors = {}
    for seed, (whose, width) in enumerate(zip(("student", "teacher"), widths, strict=True)):
        if whose == "teacher" and teacher != "hidden":
            continue
        rows = vocab + (padding if whose == "teacher" else 0)
        tensors[f"{whose}_hidden"] = logits(n, width, seed=seed, scale=1.0, dtype=dtype)
        scale = 2 * width**-0.5
        tensors[f"{whose}_weight"] = logits(rows, width, seed=seed + 2, scale=scale, dtype=dtype)
        if bias:
            tensors[f"{whose}_bias"] = logits(rows, seed=seed + 4, scale=0.5, dtype=dtype)
    if teacher == "logits":
        tensors["teacher_logits"] = logits(n, vocab, seed=7, scale=2.0, dtype=dtype)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def expected(tensors, labels, name, parameters, dtype, heads, upstream, **options):
    """Loss and gradients, by tensor; float64: the oracle's, else what a user of PyTorch writes."""

    def head(whose):
        if f"{whose}_hidden" not in tensors:
            given = tensors.get("teacher_logits")
            return given if given is None else (given.detach().to(dtype), 1.0)
        x, w, b = (tensors.get(f"{whose}_{part}") for part in ("hidden", "weight", "bias"))
        scale, cap = heads.get(f"{whose}_logit_scale", 1.0), heads.get(f"{whose}_softcap")
        z = x.detach().to(dtype) @ w.detach().to(dtype).T
        z = scale * (z if b is None else z + b.detach().to(dtype))
        if cap is None:
            return z, scale
        capped = torch.tanh(z / cap)
        return cap * capped, scale * (1 - capped * capped)

    student, slope = head("student")
    found = head("teacher")
    teacher, teacher_slope = (student, 0.0) if found is None else found
    told = dict(options, divergence_name=name, parameters=parameters)
    if dtype == torch.float64:
        truth = oracle.distillation(student, teacher, labels, **told)
        loss = torch.as_tensor(np.asarray(truth.loss, np.float64))
        by_s, by_t = (
            torch.from_numpy(np.asarray(g, np.float64))
            for g in (truth.student_grad, truth.teacher_grad)
        )
    else:
        loss, by_s, by_t = oracle.eager(student, teacher, labels, **told)
    grads = {}
    for whose, g, s in (("student", by_s, slope), ("teacher", by_t, teacher_slope)):
        g = (g.to(dtype) if upstream is None else g * upstream[:, None]).to(dtype) * s
        if f"{whose}_hidden" in tensors:
            x, w = (tensors[f"{whose}_{part}"].detach().to(dtype) for part in ("hidden", "weight"))
            grads[f"{whose}_hidden"] = g @ w
            grads[f"{whose}_weight"] = g.T @ x
            grads[f"{whose}_bias"] = g.sum(0)
        elif f"{whose}_logits" in tensors:
            grads[f"{whose}_logits"] = g
    return loss, grads


def off(got, want):
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


def check(tensors, labels, name, parameters, *, heads=None, upstream=None, floor, **options):
    """Returns the record of errors; `floor`: what an error may be however good PyTorch's own is."""
    heads = heads or {}
    dtype = tensors["student_hidden"].dtype
    given = (tensors, labels, name, parameters)
    loss, grads = expected(*given, torch.float64, heads, upstream, **options)
    # The loss is of float32 logits: no better than PyTorch's of those will do.
    own_loss, _ = expected(*given, torch.float32, heads, upstream, **options)
    _, own = expected(*given, dtype, heads, upstream, **options)
    got = kdkernels.linear_distillation_loss(
        **tensors, labels=labels, divergence=divergence(name, parameters), teacher_grad=True,
        low_memory=True, memory_budget=1, **heads, **options,
    )  # fmt: skip
    leaves = list(tensors.values())
    up = torch.ones_like(got) if upstream is None else upstream.to(got.dtype)
    got_grads = torch.autograd.grad(got, leaves, up)
    errors = {"loss": off(got, loss)}
    assert got.dtype == torch.float32
    limit = max(2 * off(own_loss, loss), 1e-6)
    assert errors["loss"] <= limit, (name, parameters, errors, limit)
    for leaf, grad, place in zip(leaves, got_grads, tensors, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        error = errors[place] = off(grad, grads[place])
        limit = min(3e-3, max(2 * off(own[place], grads[place]), floor))
        assert error <= limit, (name, parameters, place, error, limit)
    return errors


def every_option(name, n, vocab):
    """Labels with ignored and masked rows, every term, temperatures by row."""
    labels = labels_for(torch.empty(n, vocab))
    labels[1] = -100
    weights = torch.linspace(0.5, 1.5, n)
    weights[2] = 0
    options = dict(
        temperature=torch.linspace(1, 3, n), teacher_temperature=1.5, ce_weight=0.5,
        z_loss_weight=1e-3, label_smoothing=0.1, token_weights=weights, kd_weight=0.7,
    )  # fmt: skip
    heads = dict(student_softcap=5.0, student_logit_scale=0.7, teacher_logit_scale=1.3)
    return labels, heads, options


def small_tiles(kernels):
    """Many tiles and chunks in a small problem."""
    kernels.BLOCK_M, kernels.BLOCK_N, kernels.CHUNK, kernels.GROUP_M = 16, 32, 64, 2


if __name__ == "__main__":
    from kdkernels.ops.linear_distillation_loss import triton_kernels

    small_tiles(triton_kernels)
    # 18 rows in 2 blocks, 67 columns in 2 chunks, a hidden size that fills no step and one that
    # does.
    for name in DIVERGENCES:
        parameters: dict = {}
        tensors = models(18, 67, (11, 32))
        labels, heads, options = every_option(name, 18, 67)
        check(tensors, labels, name, parameters, heads=heads, floor=2e-6, **options)
    for teacher in ("logits", "none"):
        tensors = models(18, 67, (32, 7), teacher=teacher, bias=False)
        labels = labels_for(torch.empty(18, 67))
        options = dict(ce_weight=0.5, **(dict(kd_weight=0.0) if teacher == "none" else {}))
        check(tensors, labels, "forward_kl", {}, floor=2e-6, **options)
    # The teacher's weight has 5 rows more than the vocabulary.
    tensors = models(18, 67, (32, 7), padding=5)
    check(tensors, labels, "forward_kl", {}, floor=2e-6, vocab_size=67, ce_weight=0.5)
    print("all within their limits")
