"""Imports the kdkernels package of the folder given, in a fresh process: nothing may fail or be
printed, GPU or not, and every op that has a CUDA kernel must have it registered.
"""

import os
import subprocess
import sys

PROGRAM = """
import torch
import kdkernels
from kdkernels import _ext

assert _ext.cuda_error() is None, _ext.cuda_error()
assert _ext.cpp_error() is None, _ext.cpp_error()
for op in (
    "distillation_loss",
    "distillation_loss_backward",
    "distillation_loss_and_grad",
    "distillation_loss_and_grad_",
    "scale_rows_",
    "softmax",
    "softmax_backward",
    "feature_loss",
    "scale_features_",
    "joint_distillation_loss",
    "row_moments",
    "add_centered_",
    "temperature_sums",
    "adaptive_weights",
):
    for device in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{op}", device), op
"""

(folder,) = sys.argv[1:]
done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
if done.returncode or done.stdout:
    sys.exit(
        f"importing kdkernels with _C_cuda ended with {done.returncode} and printed:\n{done.stdout}"
    )
libraries = [name for name in os.listdir(f"{folder}/kdkernels") if name.endswith(".so")]
print(f"imported without a word: {', '.join(sorted(libraries))}")
