"""One small search, shared by its tests and by the processes they kill."""

import json
from pathlib import Path

import torch
from torch import nn
from trainer.runs import count_calls, make_config, make_data, make_models

from kdkernels.trainer.tune import cross_validate

GRID = {"kd_weight": [0.0, 0.9], "temperature": [1.0, 4.0]}


def make_student():
    """Drawn from the current random state, with dropout."""
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 5))


def search(run_dir=None, data=None, student=make_student, config=None, **options):
    torch.set_num_threads(1)
    arguments = {"grid": GRID, "folds": 3, "batch_size": 8, **options}
    config = {"epochs": 2, "accumulation_steps": 1, **(config or {})}
    return cross_validate(
        student,
        make_models()[1],
        data or make_data(48, labelled=0.7),
        make_config(run_dir=run_dir, **config),
        **arguments,
    )


def search_and_report(run_dir, kill_at=None):
    """Target of a child process; `kill_at` as in `run_and_report`."""
    if kill_at is not None:
        count_calls(kill_at)
    result = search(run_dir, outer_folds=2, folds=2)
    Path(run_dir, "result.json").write_text(json.dumps(result.report()))
