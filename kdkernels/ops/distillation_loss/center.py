"""The center of a teacher's logits, for ``distillation_loss(teacher_center=...)``."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._common import check_floats


class TeacherCenter(nn.Module):
    """Exponential moving average of a teacher's mean logits, as DINO keeps against collapse
    (Caron et al. 2021, arXiv 2104.14294, equation 4): c ← m·c + (1 − m)·mean of the batch.

    ::

        center = TeacherCenter(65536)
        loss = distillation_loss(student, teacher, divergence="cross_entropy", t_squared=False,
            temperature=0.1, teacher_temperature=0.04, teacher_center=center.value)
        center.update(teacher)

    Args:
        columns: V, columns of the teacher's logits, padding included.
        momentum: m in [0, 1).

    ``value`` (columns,) is a float32 buffer: it is saved, moved and checkpointed with the module.
    """

    value: Tensor

    def __init__(self, columns: int, momentum: float = 0.9):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}; accepted: [0, 1)")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(columns))

    @torch.no_grad()
    def update(self, teacher_logits: Tensor) -> None:
        """Takes in a batch (..., columns). Where torch.distributed is initialised the mean is of
        all ranks' rows, in one all_reduce, whatever each has. No rows at all: unchanged.

        The buffer is replaced, not written over, so a loss that used it may be differentiated
        after the update.
        """
        check_floats("teacher_logits", teacher_logits)
        columns = self.value.shape[0]
        if teacher_logits.dim() < 1 or teacher_logits.shape[-1] != columns:
            raise ValueError(
                f"teacher_logits has shape {tuple(teacher_logits.shape)}; accepted: "
                f"(..., {columns})"
            )
        rows = teacher_logits.reshape(-1, columns)
        # The last number is the count of rows.
        count = torch.full((1,), len(rows), dtype=torch.float32, device=rows.device)
        sums = torch.cat([rows.sum(0, dtype=torch.float32), count])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        value = self.value.float()  # module.bfloat16() may have changed the buffer
        mean = torch.where(sums[-1] > 0, sums[:-1] / sums[-1], value)
        self.value = torch.lerp(mean, value, self.momentum).to(self.value.dtype)

    def extra_repr(self) -> str:
        return f"{self.value.shape[0]}, momentum={self.momentum}"
