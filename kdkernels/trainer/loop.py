"""The training loop: one function, from prepared models to the final weights.

Accelerate places models and data, averages gradients over processes and scales fp16; what is here
is the loss, its denominators, the schedule, and a checkpoint that continues bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, send_to_device, set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from kdkernels.trainer.checkpoint import checkpoints, write_tensors
from kdkernels.trainer.config import TrainConfig, learning_rate
from kdkernels.trainer.layers import Captured, captured
from kdkernels.trainer.objective import (
    FirstSteps,
    Learner,
    Objective,
    Outputs,
    as_targets,
    check_same_inputs,
    describe,
    make_projectors,
    pair_layers,
    tensors_of,
)
from kdkernels.trainer.resume import (
    Progress,
    full_state_dict,
    kept_random_state,
    restore,
    save,
    set_random_state,
)


@dataclasses.dataclass
class TrainResult:
    """What a run did: `history` has one entry per evaluation, its "step" and what `evaluate`
    gives.
    """

    steps: int
    history: list[dict[str, float]]
    resumed_from: int | None  # the step of the checkpoint this call went on from


def train(
    config: TrainConfig,
    student: nn.Module,
    train_loader: DataLoader,
    *,
    teacher: nn.Module | None = None,
    eval_loader: DataLoader | None = None,
    objective: Objective | None = None,
) -> TrainResult:
    """Train `student` in place on labels and on what a frozen `teacher` gives.

    `objective` says what is minimised (`kdkernels.trainer.objective`); None: the labels and the
    teacher's logits, with the weights and options of `config`, which must keep their defaults where
    an objective is given.

    Loaders give `(inputs, labels)`; a model maps inputs to logits (*labels.shape, vocab); labels
    are int64, `config.ignore_index` where there is none. The loss of a step is `distillation_loss`
    with reduction "batchmean" over all its rows, however they are split into batches or processes.
    With `objective.regression` labels are floating point, NaN where there is none. Similarities and
    relations are among the samples of one batch of one process.

    In the first steps it warns, by name, of a term without a gradient and a teacher whose outputs
    are the same for all samples; a student layer without gradient and a student that changes its
    inputs before the teacher reads them are errors.

    The teacher runs in eval mode without gradient and gets its modes back; it stays on the device
    the run used, like the student. Python's, NumPy's and torch's random states are seeded.

    With `config.run_dir` the run checkpoints itself (step 0 included) and, called again, goes on
    from the newest checkpoint to the very same final weights, left in
    `run_dir/student.safetensors`. That takes the same config, models, data, number of processes and
    software, and items of the dataset that do not depend on random numbers drawn while they are
    read (augment in the model, as dropout does; or the order is right but the augmentation of the
    interrupted epoch is not).

    Raises ValueError for arguments that do not fit together, CheckpointError for a checkpoint that
    is damaged or of another run, FloatingPointError at the first step whose loss is not finite.
    """
    if objective is None:
        objective = Objective.from_config(config)
    else:
        _check_replaced(config)
    _check_arguments(objective, train_loader, teacher)
    # Accelerate keeps one precision a process; a second run with another would be refused.
    if (
        AcceleratorState._shared_state
        and AcceleratorState().mixed_precision != config.mixed_precision
    ):
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True,
            # Accelerate shuffles epoch e with data_seed + e: far apart, or neighbouring seeds would
            # see the same orders one epoch later.
            data_seed=config.seed * 1_000_003,
        ),
    )
    _check_launch(accelerator)
    set_seed(config.seed, device_specific=True)
    with (
        _kept_modes(student, teacher),
        _kept_sampler(train_loader),
        _kept_sampler(eval_loader),
        ExitStack() as hooks,
    ):
        terms = _Terms(objective)
        learner: nn.Module = student
        if objective.layer_entries():
            assert teacher is not None
            learner = _make_learner(
                config, accelerator, terms, student, teacher, train_loader, hooks
            )
        optimizer = _make_optimizer(config, learner)
        learner.train()
        model, optimizer, loader = accelerator.prepare(learner, optimizer, train_loader)
        if eval_loader is not None:
            eval_loader = accelerator.prepare_data_loader(eval_loader)
        if teacher is not None:
            teacher.to(accelerator.device).eval()
        try:
            return _run(config, accelerator, terms, model, optimizer, loader, teacher, eval_loader)
        finally:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)


@dataclasses.dataclass
class _Terms:
    """An objective and what it found in the models."""

    objective: Objective
    pairs: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    of_teacher: Captured | None = None


def _make_learner(
    config: TrainConfig,
    accelerator: Accelerator,
    terms: _Terms,
    student: nn.Module,
    teacher: nn.Module,
    loader: DataLoader,
    hooks: ExitStack,
) -> Learner:
    """Put hooks on both models, and projectors where their layers' widths differ."""
    terms.pairs = pair_layers(terms.objective, student, teacher)
    sides = list(zip(*(pair for pairs in terms.pairs.values() for pair in pairs), strict=True))
    of_student = hooks.enter_context(captured(student, sides[0], what="student"))
    of_teacher = hooks.enter_context(captured(teacher, sides[1], what="teacher"))
    terms.of_teacher = of_teacher
    # Two samples through both models show the widths; nothing of that stays in the run.
    with kept_random_state(), torch.no_grad():
        indices = range(min(2, len(loader.dataset)))  # type: ignore[arg-type]
        batch = loader.collate_fn([loader.dataset[i] for i in indices])
        inputs = send_to_device(batch, accelerator.device)[0]
        for model in (student, teacher):
            model.to(accelerator.device).eval()
            model(inputs)
        seen = of_student.take(), of_teacher.take()
    with kept_random_state():
        torch.manual_seed(config.seed)  # the same on every process
        projectors = make_projectors(terms.objective, terms.pairs, *seen)
    return Learner(student, projectors, of_student)


def _run(
    config: TrainConfig,
    accelerator: Accelerator,
    terms: _Terms,
    student: nn.Module,
    optimizer: Any,
    loader: Any,  # a DataLoader as Accelerate wraps it
    teacher: nn.Module | None,
    eval_loader: DataLoader | None,
) -> TrainResult:
    """`train` after everything is prepared: the loop itself."""
    batches_per_epoch = len(loader)
    steps_per_epoch = -(-batches_per_epoch // config.accumulation_steps)
    total_steps = steps_per_epoch * config.epochs
    eval_every = config.eval_every or steps_per_epoch
    checkpoint_every = config.checkpoint_every or steps_per_epoch
    parameters = [p for p in student.parameters() if p.requires_grad]
    inner = accelerator.unwrap_model(student)
    exported = inner.student if isinstance(inner, Learner) else inner
    from_config = terms.objective == Objective.from_config(config)
    described = None if from_config else describe(terms.objective)
    first: FirstSteps | None = FirstSteps(terms.objective)

    folder = Path(config.run_dir) / "checkpoints" if config.run_dir is not None else None
    progress, random_state, resumed_from = Progress(), None, None
    if folder is not None:
        restored = restore(
            config, accelerator, student, optimizer, folder, batches_per_epoch, described
        )
        if restored is None:
            # Also keeps the initial weights, which a restarted script may not draw again.
            save(
                config,
                accelerator,
                student,
                optimizer,
                folder,
                batches_per_epoch,
                progress,
                described,
            )
        else:
            progress, random_state = restored
            resumed_from = progress.step

    writer = None
    if config.run_dir is not None and accelerator.is_main_process:
        # purge_step hides what a killed run logged after the checkpoint it restarts from.
        writer = SummaryWriter(f"{config.run_dir}/tensorboard", purge_step=progress.step + 1)
    bar = tqdm(
        total=total_steps,
        initial=progress.step,
        unit="step",
        # None: off unless standard error is a terminal.
        disable=None if config.progress and accelerator.is_main_process else True,
    )
    if random_state is not None and progress.batch == 0:
        set_random_state(random_state)  # the data loader draws from it when an epoch starts ...
        random_state = None
    optimizer.zero_grad()  # the caller may have left gradients behind
    with bar, writer or nullcontext():
        for epoch in range(progress.epoch, config.epochs):
            loader.set_epoch(epoch)
            for window in _windows(loader, progress.batch, config.accumulation_steps):
                if random_state is not None:
                    set_random_state(random_state)  # ... but had done so long before this point
                    random_state = None
                rate = learning_rate(config, progress.step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                scalars = _backward(
                    config, accelerator, terms, student, teacher, window, progress.step, first
                )
                if first is not None:
                    first.steps += 1
                    if first.steps == FirstSteps.STEPS or progress.step + 1 == total_steps:
                        first.report(accelerator)
                        first = None
                norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
                _check_finite(accelerator, scalars["loss"], norm, progress, folder)
                optimizer.step()
                optimizer.zero_grad()
                progress.step += 1
                progress.batch += len(window)
                if progress.batch == batches_per_epoch:
                    progress.epoch, progress.batch = epoch + 1, 0

                bar.update()
                last = progress.step == total_steps
                if last or progress.step % config.log_every == 0:
                    bar.set_postfix(loss=f"{scalars['loss']:.4g}", refresh=False)
                    scalars |= {"learning_rate": rate, "grad_norm": float(norm)}
                    if terms.objective.regularizer is not None:
                        share = terms.objective.regularizer.removable_channels(exported)
                        scalars["removable_channels"] = share
                    _log(writer, "train", scalars, progress.step)
                if eval_loader is not None and (last or progress.step % eval_every == 0):
                    with kept_random_state():  # so that eval_every does not change the training
                        metrics = evaluate(
                            student,
                            eval_loader,
                            ignore_index=config.ignore_index,
                            accelerator=accelerator,
                        )
                    progress.history.append({"step": progress.step, **metrics})
                    _log(writer, "eval", metrics, progress.step)
                if folder is not None and (last or progress.step % checkpoint_every == 0):
                    if writer is not None:
                        writer.flush()  # a resumed run does not log these steps again
                    save(
                        config,
                        accelerator,
                        student,
                        optimizer,
                        folder,
                        batches_per_epoch,
                        progress,
                        described,
                    )
    if config.run_dir is not None:
        weights = full_state_dict(exported)
        if accelerator.is_main_process:
            write_tensors(Path(config.run_dir) / "student.safetensors", weights)
        accelerator.wait_for_everyone()
    return TrainResult(progress.step, progress.history, resumed_from)


def _backward(
    config: TrainConfig,
    accelerator: Accelerator,
    terms: _Terms,
    student: nn.Module,
    teacher: nn.Module | None,
    window: list[tuple[Any, Tensor]],
    step: int,
    first: FirstSteps | None,
) -> dict[str, float]:
    """Accumulate the gradient of one step; return its loss and the means of its terms.

    Terms are averaged over different rows, and a batch may hold any share of them: dividing each
    batch by its own counts would weigh rows of small batches more, so the counts are taken over the
    whole step, all processes included, before the first backward.
    """
    objective = terms.objective
    counts = torch.zeros(3, dtype=torch.int64, device=accelerator.device)
    for _, labels in window:
        counts += objective.counts(labels, config.ignore_index)
    # Processes average their gradients where a step needs the sum.
    scales = [
        accelerator.num_processes / rows
        for rows in accelerator.reduce(counts).clamp(min=1).tolist()
    ]
    inner = accelerator.unwrap_model(student)
    learner = inner if isinstance(inner, Learner) else None
    weights = objective.weights_at(step)

    totals: dict[str, Tensor] = {}
    for index, (inputs, labels) in enumerate(window):
        last = index == len(window) - 1
        with nullcontext() if last else accelerator.no_sync(student):
            before = [x.clone() for x in tensors_of(inputs)] if first is not None else []
            output = student(inputs)
            if first is not None:
                check_same_inputs(before, inputs)
            own = Outputs(output, {}, {})
            if learner is not None:
                own = Outputs(output, learner.layers, learner.projected)
            theirs = None
            if teacher is not None:
                with torch.no_grad(), accelerator.autocast():
                    target = teacher(inputs)
                of_teacher = terms.of_teacher.take() if terms.of_teacher is not None else {}
                theirs = Outputs(target, of_teacher, {})
            options: dict[str, Any] = {
                "scales": scales,
                "step": step,
                "ignore_index": config.ignore_index,
            }
            if first is not None:
                first.watch(own, theirs, labels, terms.pairs, **options)
            loss, values = objective.loss(
                own, theirs, labels, terms.pairs, weights=weights, **options
            )
            if last and objective.regularizer is not None:
                # Of the weights, not of rows: once a step, the same on every process.
                model = learner.student if learner is not None else inner
                size = objective.regularizer.value(model)
                loss = loss + weights.get("regularizer", 0.0) * size
                values["regularizer"] = size.detach()
            accelerator.backward(loss)
        for name, value in {"loss": loss.detach(), **values}.items():
            totals[name] = totals.get(name, 0.0) + value.float()
    reduced = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
    return dict(zip(totals, reduced, strict=True))


def _log(writer: SummaryWriter | None, group: str, values: dict[str, float], step: int) -> None:
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, step)


def _check_finite(
    accelerator: Accelerator,
    loss: float,
    norm: Any,
    progress: Progress,
    folder: Path | None,
) -> None:
    # With a gradient scaler (fp16) an infinite gradient is normal: the scaler skips that step.
    bad_norm = accelerator.scaler is None and not bool(torch.isfinite(torch.as_tensor(norm)))
    if np.isfinite(loss) and not bad_norm:
        return
    kept = checkpoints(folder) if folder is not None else []
    raise FloatingPointError(
        f"step {progress.step + 1} (epoch {progress.epoch}, batch {progress.batch}): loss is {loss}"
        f"{', gradient norm is ' + str(float(norm)) if bad_norm else ''}; the weights are those of"
        f" step {progress.step}. "
        + (f"The last checkpoint is {kept[-1]}" if kept else "There is no checkpoint")
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    *,
    ignore_index: int = -100,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Top-1 accuracy and mean cross-entropy (nats) over the rows that have a label, as {"accuracy",
    "cross_entropy"}; where labels are real targets, mean squared and absolute error over those that
    are not NaN, as {"mse", "mae"}.

    `loader` gives `(inputs, labels)` as in `train`. The model runs in eval mode and gets its modes
    back. Without an accelerator, model and loader are used as they are, on the device they are on.
    Raises ValueError if no row has a label.
    """
    names = ("accuracy", "cross_entropy")
    totals, count = [0.0, 0.0], 0.0
    with _kept_modes(model):
        model.eval()
        for inputs, labels in loader:
            with accelerator.autocast() if accelerator is not None else nullcontext():
                logits = model(inputs).float()
            if labels.is_floating_point():
                names = ("mse", "mae")
                valid = ~labels.isnan()
                error = as_targets("model", logits, labels) - labels
                first, second = error.square(), error.abs()
            else:
                valid = labels != ignore_index
                first = logits.argmax(-1) == labels
                second = F.cross_entropy(
                    logits.movedim(-1, 1), labels, ignore_index=ignore_index, reduction="none"
                )
            if accelerator is not None:  # drops what a sharded loader repeats to even out its end
                first, second, valid = accelerator.gather_for_metrics((first, second, valid))
            for index, values in enumerate((first, second)):
                totals[index] += torch.where(valid, values, 0).double().sum().item()
            count += valid.sum().item()
    if count == 0:
        raise ValueError("the evaluation loader has no row with a label: accuracy is undefined")
    return {name: total / count for name, total in zip(names, totals, strict=True)}


def _windows(loader: DataLoader, done: int, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Lists of `size` consecutive batches, the last as long as the epoch leaves it."""
    window = []
    for batch in skip_first_batches(loader, done) if done else loader:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


@contextmanager
def _kept_sampler(loader: DataLoader | None) -> Iterator[None]:
    """Accelerate puts its seeded sampler into the caller's own batch sampler; take it out again."""
    holder: Any = getattr(loader, "batch_sampler", None)
    sampler = getattr(holder, "sampler", None)
    try:
        yield
    finally:
        if sampler is not None:
            holder.sampler = sampler


@contextmanager
def _kept_modes(*models: nn.Module | None) -> Iterator[None]:
    """Give every submodule its train or eval mode back."""
    modes = [(m, m.training) for model in models if model is not None for m in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _make_optimizer(config: TrainConfig, student: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("student has no parameter that requires grad")
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)


def _check_launch(accelerator: Accelerator) -> None:
    """Refuse the launches whose gradients or optimiser states this loop would get wrong."""
    kind = accelerator.distributed_type
    version_1 = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    others = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    if version_1 or kind in others:
        given = "FSDP with fsdp_version 1" if version_1 else kind.value
        raise ValueError(
            f"launched with {given}; accepted are one process, DDP and FSDP with fsdp_version 2"
        )


def _check_replaced(config: TrainConfig) -> None:
    for name in (
        "kd_weight",
        "ce_weight",
        "z_loss_weight",
        "divergence",
        "divergence_args",
        "temperature",
        "label_smoothing",
        "mask_kd",
    ):
        if getattr(config, name) != getattr(TrainConfig(), name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r} in the config while an objective is given, "
                "which takes its place: say it there"
            )


def _check_arguments(objective: Objective, loader: DataLoader, teacher: nn.Module | None) -> None:
    needing = objective.teacher_terms()
    if teacher is None and needing == ["logits"] and not objective.layer_entries():
        raise ValueError(
            f"teacher is None while kd_weight is {objective.weights.get('logits', 1.0)}; give a "
            "teacher, or kd_weight=0 (weights={'logits': 0} in an objective)"
        )
    if teacher is None and needing:
        raise ValueError(f"teacher is None; {', '.join(needing)} need one")
    try:
        batches = len(loader)
    except TypeError:
        raise ValueError("train_loader has no length; accepted is a map-style dataset") from None
    if batches == 0:
        raise ValueError("train_loader is empty")
    if loader.batch_sampler is None:  # Accelerate cannot shuffle or shard it
        raise ValueError(
            "train_loader has batch_size None; accepted is a loader that makes batches"
        )
