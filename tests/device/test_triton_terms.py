"""Every divergence has a Triton term, and it is the torch term."""

import pytest
import torch
from cases import ALL, divergence

from kdkernels.divergences import DIVERGENCES, TERMS, geometric

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from kdkernels import divergences_triton  # noqa: E402


@triton.jit
def evaluate(a, b, out, first, second, log_b, n, TERM: tl.constexpr, MIXES: tl.constexpr):
    i = tl.arange(0, 128)
    log2_e: tl.constexpr = 1.4426950408889634
    x = tl.load(a + i, mask=i < n, other=0.0)
    y = tl.load(b + i, mask=i < n, other=0.0)
    p, q, e = divergences_triton.probabilities(x * log2_e, y * log2_e, MIXES)
    phi, g, h = TERM(x * log2_e, y * log2_e, p, q, e, first, second, log_b * log2_e, True)
    tl.store(out + i, phi + tl.zeros((128,), tl.float32), mask=i < n)
    tl.store(out + n + i, g, mask=i < n)
    tl.store(out + 2 * n + i, h, mask=i < n)


def test_every_divergence_has_a_term():
    assert list(divergences_triton.TERMS) == list(DIVERGENCES)


@pytest.mark.parametrize("name, parameters", ALL)
def test_agrees_with_the_torch_term(name, parameters, triton_runs):
    """Log-probabilities far apart, nearly and exactly equal, and -inf on both sides."""
    member = divergence(name, parameters)
    first, second = float(member.first), float(member.second)
    far = -torch.linspace(0.01, 30, 40)
    a = torch.cat([far, far, far, torch.tensor([-1.0, -torch.inf, -torch.inf])])
    b = torch.cat([far.flip(0), far - 1e-3, far, torch.tensor([-torch.inf, -1.0, -torch.inf])])
    if name in ("forward_kl", "reverse_kl", "jeffreys", "alpha", "renyi", "dkd"):
        a, b = a[:-3], b[:-3]  # where they are infinite the torch term is the oracle's business
    log_b = -0.3
    out = torch.empty(3, len(a))
    term = divergences_triton.TERMS[name]
    with triton_runs():
        evaluate[(1,)](
            a, b, out, first, second, log_b, len(a), TERM=term.function, MIXES=term.mixes
        )
    wide = [a.double(), b.double(), a.double().exp(), b.double().exp()]
    parameters_64 = [torch.tensor(x, dtype=torch.float64) for x in (first, second)]
    want = list(TERMS[name](*wide, *parameters_64))
    if name == "renyi" and first != 1:
        tilted = torch.exp(geometric(wide[0], wide[1], parameters_64[0]) - log_b)
        want[1:] = [-tilted, first / (first - 1) * tilted]
    scale = torch.maximum(torch.maximum(wide[2], wide[3]), want[1].abs())
    if name in ("alpha", "renyi", "ab"):  # differences of powers, over the parameters
        k = first + second if name == "ab" else 1
        scale = 10 * torch.maximum(scale, torch.maximum((k * wide[0]).exp(), (k * wide[1]).exp()))
    if name == "jsd" and second and 0 < first < 1:
        scale = scale / (first * (1 - first))
    for got, expected, what in zip(out, want, ("phi", "g", "h"), strict=True):
        error = (got.double() - expected).abs() / torch.maximum(scale, expected.abs())
        # 30 log2 units of an exponent in float32 are 2e-6 of the exponential.
        assert error.nan_to_num(0).max() < 4e-6, (what, error.argmax(), got, expected)
        assert torch.equal(got.isnan(), expected.isnan()), what
