"""Matrix products with a float32 result of bfloat16 or float16 matrices."""

import torch
from torch import Tensor


def into_float32(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out (m, n) float32 = a (m, k) @ b (k, n), or += that, a and b of one dtype.

    On CUDA by cuBLAS, which adds up in float32 anyway and leaves out the rounding; torch.mm with
    ``out_dtype`` has no kernel elsewhere.
    """
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif out.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, torch.float32, out=out)
        else:
            torch.mm(a, b, torch.float32, out=out)
    else:
        torch.ops.kdkernels.mm_float32_(out, a, b, accumulate)
