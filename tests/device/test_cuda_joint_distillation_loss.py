"""joint_distillation_loss's CUDA kernel, executed as PTX on the CPU through its own launch code."""

import emulate
import emulate_features
import pytest
import torch
from cases import labels_for, pair
from feature_cases import case

import kdkernels

REASON = emulate.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def both(op, *args, features):
    """(loss, gradients) of the logits and of the features."""
    student, teacher, labels, options = args
    leaf = student.detach().requires_grad_()

    def joint(leaves, teachers, **feature_options):
        names = {"mask": "feature_mask", "weights": "feature_weights"}
        named = {names.get(k, k): v for k, v in feature_options.items()}
        reduction = named.pop("reduction", "batchmean")
        return op(
            leaf, teacher, labels, leaves, teachers, feature_reduction=reduction, **named, **options
        )

    students, teachers, feature_options = features
    leaves = [x.detach().requires_grad_() for x in students]
    variance = feature_options.get("log_variance")
    if variance is not None:
        variance = [x.detach().requires_grad_() for x in variance]
        feature_options = feature_options | {"log_variance": variance}
    loss = joint(leaves, teachers, **feature_options)
    inputs = [leaf, *leaves, *(variance or [])]
    return loss.detach(), torch.autograd.grad(loss, inputs)


# What each is for: a warp a row beside streamed features; a block a row with masks, whose sums
# blocks wait for; a cluster of blocks a row; a row whose blocks meet in device memory, because the
# features' do; DKD; a divergence without a kernel of its own.
@pytest.mark.parametrize(
    "vocab, dtype, metric, masked, options, launches",
    [
        (100, torch.bfloat16, "l2", False, dict(ce_weight=0.5), 1),
        (2056, torch.float32, "cosine", True, dict(ce_weight=0.5), 1),
        (32000, torch.bfloat16, "smooth_l1", False, {}, 1),
        (100, torch.float32, "attention", True, dict(divergence="dkd"), 1),
        (128256, torch.bfloat16, "l2", True, {}, 1),
        (131, torch.float32, "gaussian_nll", False, {}, 1),
        (131, torch.float32, "l2", False, dict(divergence="jsd"), 2),
    ],
)
def test_one_launch(vocab, dtype, metric, masked, options, launches):
    student, teacher = pair(3, vocab, dtypes=(dtype, dtype))
    labels = labels_for(student)
    features = case(metric, {}, dtype, masked, "batchmean", (1, 3, 5))
    options = dict(options, temperature=2.0)
    args = (student, teacher, labels, options)
    (loss, grads), record = emulate_features.cuda(
        both, kdkernels.joint_distillation_loss, *args, features=features
    )
    record.assert_clean()
    assert record.launches == launches + 1  # the upstream factor, without a look at it
    # Each part by itself has its truth in its own tests.
    wide = [x.double() for x in (student, teacher)]
    doubles = {
        name: [x.double() if isinstance(x, torch.Tensor) else x for x in value]
        if name in ("mask", "log_variance")
        else value
        for name, value in features[2].items()
    }
    truth, exact = both(
        kdkernels.joint_distillation_loss,
        *wide,
        labels,
        options | {"backend": "reference"},
        features=([x.double() for x in features[0]], [x.double() for x in features[1]], doubles),
    )
    torch.testing.assert_close(loss.double(), truth, rtol=3e-6, atol=0)
    for mine, theirs in zip(grads, exact, strict=True):
        largest = theirs.abs().max().item()
        unit = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(
            mine.double(), theirs, rtol=unit, atol=largest * (2 * unit if unit > 1e-6 else 3e-6)
        )
