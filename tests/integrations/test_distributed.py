"""linear_distillation_loss under data parallelism: two gloo processes against one.

A process each holds half of the tokens; losses and averaged gradients must be those of one process
that averages over the halves.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import kdkernels

RANKS, TOKENS, INPUTS, HS, HT, V = 2, 6, 5, 8, 7, 31  # V: shards of 16 and 15 rows
OPTIONS = dict(divergence="jsd", ce_weight=0.5, temperature=2.0, chunk_rows=4)


class Student(nn.Module):
    """A body, a head, and a forward that ends in the loss, as DDP and FSDP want it."""

    def __init__(self, teacher_head):
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, HS), nn.Linear(HS, V)
        self.loss = kdkernels.LinearDistillationLoss(self.head, teacher_head, **OPTIONS)
        self.checkpointed = False

    def forward(self, x, of_teacher, labels, with_loss=True):
        if not with_loss:
            return self.body(x)
        if self.checkpointed:
            return checkpoint(self._loss, x, of_teacher, labels, use_reentrant=False)
        return self._loss(x, of_teacher, labels)

    def _loss(self, x, of_teacher, labels):
        return self.loss(self.body(x), of_teacher, labels)


def make(seed=0):
    """The same on every process."""
    torch.manual_seed(seed)
    student = Student(nn.Linear(HT, V).requires_grad_(False))
    halves = [
        (torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, HT), torch.randint(V, (TOKENS,)))
        for _ in range(RANKS)
    ]
    halves[0][2][:4] = -100  # another number of tokens that count
    return student, halves


def one_process():
    student, halves = make()
    losses = [student(*half) for half in halves]
    (sum(losses) / RANKS).backward()
    return losses, dict(student.named_parameters())


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def check(student, loss, rank, tolerance=1e-6):
    losses, parameters = one_process()
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss.detach().float(), losses[rank].detach(), **close)
    for name, parameter in student.named_parameters():
        got = whole(parameter.grad)
        torch.testing.assert_close(got, parameters[name.removeprefix("module.")].grad, **close)


def ddp(rank):
    student, halves = make()
    student.checkpointed = True
    model = nn.parallel.DistributedDataParallel(student)
    loss = model(*halves[rank])
    loss.backward()
    check(model, loss, rank)


def ddp_accumulating(rank):
    """Gradients of two backwards without a reduction between them add up."""
    student, halves = make()
    model = nn.parallel.DistributedDataParallel(student)
    with model.no_sync():
        (model(*halves[rank]) / 4).backward()
    loss = model(*halves[rank])
    (loss * 0.75).backward()
    check(model, loss, rank)


def fsdp_root(rank):
    """The head belongs to the module whose forward has the loss: gathered there."""
    student, halves = make()
    fully_shard(student.body)
    fully_shard(student)
    assert isinstance(student.head.weight, DTensor)
    loss = student(*halves[rank])
    loss.backward()
    check(student, loss, rank)
    assert all(isinstance(p, DTensor) for p in student.parameters())  # freed again


def fsdp_head(rank):
    """The head is sharded on its own, and its forward never runs: the loss gathers it. Twice."""
    student, halves = make()
    fully_shard(student.head)
    fully_shard(student)
    for checkpointed in (False, True):
        student.zero_grad()
        student.checkpointed = checkpointed
        loss = student(*halves[rank])
        loss.backward()
        check(student, loss, rank)
    # Made after sharding, it takes the same heads.
    again = kdkernels.LinearDistillationLoss(student.head, student.loss._heads[1], **OPTIONS)
    hidden = student(*halves[rank], with_loss=False)
    assert torch.equal(again(hidden, *halves[rank][1:]), loss)


def fsdp_outside(rank):
    """The loss behind the sharded module's forward, on what it returns."""
    for parts in ((), ("head",)):
        student, halves = make()
        for part in parts:
            fully_shard(getattr(student, part))
        fully_shard(student)
        hidden = student(*halves[rank], with_loss=False)
        loss = student.loss(hidden, *halves[rank][1:])
        loss.backward()
        check(student, loss, rank)


def fsdp_refused(rank):
    student, halves = make()
    fully_shard(student)
    x, of_teacher, labels = halves[rank]
    teacher = student.loss._heads[1]
    try:
        student.loss(torch.randn(TOKENS, HS), of_teacher, labels)
    except TypeError as error:
        assert "student_weight is a DTensor" in str(error) and "unshard()" in str(error), error
    else:
        raise AssertionError("a sharded weight was taken as the whole one")
    student.unshard()  # the remedy
    student.loss(torch.randn(TOKENS, HS), of_teacher, labels)
    try:
        kdkernels.linear_distillation_loss(
            torch.randn(TOKENS, HT), teacher.weight, teacher_logits=whole_logits(rank)
        )
    except TypeError as error:
        assert "teacher_logits is a DTensor" in str(error), error
    else:
        raise AssertionError("teacher_logits as a DTensor were taken")


def whole_logits(rank):
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    return distribute_tensor(torch.zeros(TOKENS, V), mesh, [Replicate()])


def fsdp_bfloat16(rank):
    """Gathered in bfloat16, reduced in float32: the loss sees bfloat16 weights."""
    student, halves = make()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(student, mp_policy=policy)
    loss = student(*halves[rank])
    loss.backward()
    check(student, loss, rank, tolerance=2e-2)


CASES = [
    ddp,
    ddp_accumulating,
    fsdp_root,
    fsdp_head,
    fsdp_outside,
    fsdp_refused,
    fsdp_bfloat16,
]


def _worker(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for case in CASES:
            try:
                case(rank)
            except BaseException as error:
                raise AssertionError(f"{case.__name__} on rank {rank}") from error
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """Every case of CASES, in one pair of processes: each takes 3 s to start."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "store"),), nprocs=RANKS)
