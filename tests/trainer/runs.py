"""One small distillation run, shared by the trainer's tests and by the processes they kill."""

import json
import os
import shutil
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.trainer import TrainConfig, train

CLASSES = 5


def make_data(rows=44, seed=0, labelled=0.4):
    """(rows, 12) inputs and labels of which all but a share are -100."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 12, generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= labelled] = -100
    return inputs, labels


def make_loader(inputs, labels, batch_size=4, shuffle=True):
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, shuffle=shuffle)


def make_models(seed=0):
    """A student with dropout (random numbers) and batch norm (buffers), and a teacher."""
    torch.manual_seed(seed)
    student = nn.Sequential(
        *(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))
    )
    teacher = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    return student, teacher


def make_config(**options):
    """11 batches an epoch, in steps of 2: the last step of an epoch is a short one."""
    defaults = {
        "epochs": 4,
        "accumulation_steps": 2,
        "mask_kd": False,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "progress": False,
        "checkpoint_every": 4,
    }
    return TrainConfig(**{**defaults, **options})


def run(run_dir=None, student=None, teacher=None, **options):
    """Train on `make_data`; returns (student, result)."""
    torch.set_num_threads(1)
    models = make_models()
    student, teacher = student or models[0], teacher or models[1]
    config = make_config(run_dir=run_dir, **options)
    eval_loader = make_loader(*make_data(30, seed=1, labelled=0.8), batch_size=7, shuffle=False)
    result = train(
        config, student, make_loader(*make_data()), teacher=teacher, eval_loader=eval_loader
    )
    return student, result


def run_and_report(run_dir, options, kill_at=None):
    """Target of a child process: the run, its result in result.json, and perhaps a SIGKILL.

    `kill_at` is the number of the file-system call of the checkpoint writer (fsync, rename, replace
    or rmtree) that is never made: the process kills itself there.
    """
    torch.set_num_threads(1)
    if kill_at is not None:
        count_calls(kill_at)
    _, result = run(run_dir, **options)
    Path(run_dir, "result.json").write_text(json.dumps(result.history))


def count_calls(kill_at):
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)
