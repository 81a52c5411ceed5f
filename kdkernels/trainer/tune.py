"""λ, T and any other option of a run, chosen by cross-validation.

    from kdkernels.trainer import TrainConfig
    from kdkernels.trainer.tune import cross_validate

    config = TrainConfig(run_dir="runs/tune", mask_kd=False)
    grid = {"kd_weight": [0.1, 0.9], "temperature": [1.0, 2.0, 4.0]}
    result = cross_validate(make_student, teacher, (inputs, labels), config, grid=grid)
    print(result.table(), result.chosen)

A job is one student trained with one setting on one part of the rows and scored on another. All
jobs are independent and seeded, so that they run in any order, in any process, once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels.trainer._extras import require
from kdkernels.trainer.checkpoint import CheckpointError, read_json, write_file, write_json
from kdkernels.trainer.config import FREE_TO_CHANGE, TrainConfig
from kdkernels.trainer.data import make_loader
from kdkernels.trainer.loop import evaluate, train
from kdkernels.trainer.mnist import (
    EVAL_BATCH,
    MnistConfig,
    find_teacher,
    hide_labels,
    load_digits,
    one_thread,
)
from kdkernels.trainer.mnist import make_student as make_mnist_student

require("joblib", "matplotlib", "scipy", "sklearn")
from joblib import Parallel, delayed  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402
from sklearn.model_selection import KFold, StratifiedKFold  # noqa: E402

METRICS = {"accuracy": 1.0, "cross_entropy": -1.0}  # those of `evaluate`; +1: more is better
# Fields that do not belong in a grid: the folds fix the seed and the data fix what has no label.
_NOT_IN_GRID = (*FREE_TO_CHANGE, "eval_every", "seed", "ignore_index")
_AT_THE_END = 1 << 60  # steps between evaluations that leave only the one after the last step

Setting = dict[str, Any]
_Splits = list[tuple[np.ndarray, np.ndarray]]  # (training rows, test rows) of each fold
Figures = dict[str, Any]  # {"accuracy", "cross_entropy"}, or {"error"} of a run that diverged


@dataclasses.dataclass(frozen=True)
class SettingScores:
    """One setting of the grid and its score on every fold it was trained for.

    `mean` and `half_width` (95 %) are of the metric; None if a run diverged (`error` says where).
    """

    setting: Setting
    scores: list[float]
    mean: float | None
    half_width: float | None
    dropped: bool  # by successive halving, after len(scores) folds
    error: str | None


@dataclasses.dataclass(frozen=True)
class OuterTest:
    """The nested test: each outer fold's own choice against the defaults, on rows neither saw.

    `regret` is by how much the defaults were better, fold by fold, in units of the metric: below 0
    the choice paid. Its mean and 95 % half width are paired by fold.
    """

    chosen: list[Setting]
    scores: list[float]
    default_scores: list[float]
    regret: list[float]
    mean_regret: float
    half_width: float


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """What `cross_validate` found; `config` and `student` are those of the chosen setting."""

    chosen: Setting
    settings: list[SettingScores]  # in the order of the grid
    config: TrainConfig
    student: nn.Module
    outer: OuterTest | None
    metric: str
    folds: int
    stratified: bool

    def report(self) -> dict[str, Any]:
        """Everything but the student, as JSON holds it."""
        return {
            "chosen": self.chosen,
            "metric": self.metric,
            "folds": self.folds,
            "stratified": self.stratified,
            "settings": [dataclasses.asdict(entry) for entry in self.settings],
            "outer": None if self.outer is None else dataclasses.asdict(self.outer),
        }

    def table(self) -> str:
        """Markdown, best setting first; those that were dropped or diverged last."""
        names = list(self.settings[0].setting)
        rows = [[*names, self.metric, "folds", ""], ["---"] * (len(names) + 3)]
        for entry in sorted(self.settings, key=self._order):
            note = "**chosen**" if entry.setting == self.chosen else ""
            note = f"diverged: {entry.error}" if entry.error else "dropped" * entry.dropped or note
            cells = [_text(entry.setting[name]) for name in names]
            rows.append([*cells, _with_interval(entry), str(len(entry.scores)), note])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            [cell.ljust(width, cell[-1:] if cell == "---" else " ") for cell, width in zipped]
            for zipped in (zip(row, widths, strict=True) for row in rows)
        ]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        if self.outer is None:
            return text
        outer = self.outer
        return (
            f"{text}\n\nNested test on {len(outer.scores)} outer folds: {self.metric} "
            f"{statistics.fmean(outer.scores):.4f} with the setting chosen inside each, "
            f"{statistics.fmean(outer.default_scores):.4f} with the defaults; regret "
            f"{outer.mean_regret:+.4f} ± {outer.half_width:.4f}"
        )

    def _order(self, entry: SettingScores) -> tuple[bool, int, float]:
        mean = math.inf if entry.mean is None else -METRICS[self.metric] * entry.mean
        return entry.setting != self.chosen, -len(entry.scores), mean

    def heat_map(self, rows: str, columns: str) -> bytes:
        """PNG of the mean score over two keys of the grid; over its other keys the best is shown.

        A cell that halving dropped says after how many folds. Raises ValueError for another key.
        """
        for key in (rows, columns):
            _check_key(key, self.settings[0].setting, "heat_map")
        values = {
            key: list({_text(e.setting[key]): e.setting[key] for e in self.settings})
            for key in (rows, columns)
        }
        cells: dict[tuple[int, int], SettingScores] = {}
        for entry in sorted(self.settings, key=self._order):
            place = (
                values[rows].index(_text(entry.setting[rows])),
                values[columns].index(_text(entry.setting[columns])),
            )
            cells.setdefault(place, entry)  # the best of them comes first
        image = np.full((len(values[rows]), len(values[columns])), np.nan)
        for place, entry in cells.items():
            image[place] = np.nan if entry.mean is None else entry.mean
        figure = Figure(
            figsize=(2.4 + 1.1 * image.shape[1], 1.8 + 0.6 * image.shape[0]),
            dpi=150,
            layout="constrained",
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        colours = "viridis" if METRICS[self.metric] > 0 else "viridis_r"
        shown = axes.imshow(image, cmap=colours, aspect="auto")
        for place, entry in cells.items():
            text = "diverged" if entry.mean is None else f"{entry.mean:.4f}"
            text += f"\n{len(entry.scores)} of {self.folds} folds" * entry.dropped
            chosen = entry.setting == self.chosen
            axes.text(
                *(place[1], place[0], text),
                ha="center",
                va="center",
                fontsize=8,
                weight="bold" if chosen else "normal",
                bbox={
                    "facecolor": "white",
                    "alpha": 0.8,
                    "edgecolor": "black" if chosen else "none",
                },
            )
        axes.set_xticks(range(len(values[columns])), values[columns])
        axes.set_yticks(range(len(values[rows])), values[rows])
        axes.set(xlabel=columns, ylabel=rows)
        others = len(self.settings) > image.size
        axes.set_title(
            f"{self.metric}, mean of {self.folds} folds{'; best of the other keys' * others}",
            fontsize=9,
        )
        figure.colorbar(shown)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def cross_validate(
    make_student: Callable[[], nn.Module],
    teacher: nn.Module | None,
    data: tuple[Tensor, Tensor],
    config: TrainConfig,
    *,
    grid: Mapping[str, Sequence[Any]],
    folds: int = 5,
    outer_folds: int | None = None,
    halving: bool = False,
    metric: str = "accuracy",
    batch_size: int = 64,
    workers: int = 1,
) -> TuneResult:
    """Choose the setting of `grid` that is best over `folds` folds, and train a student with it.

    `data` is `(inputs, labels)`, two CPU tensors with N rows; labels are int64 (N, ...),
    `config.ignore_index` where there is none. The labelled rows are split, stratified by class
    where a row has one label and every class has at least `folds` rows, at random otherwise; rows
    without any label are in every training part. With unlabelled rows set `mask_kd=False`, or they
    take no part. A teacher that was trained on the labels of `data` has seen every validation part:
    the scores are then optimistic, and more so the more a setting relies on the teacher.

    `grid` maps fields of `TrainConfig` to the values to try, every combination of them; all other
    fields are those of `config`, the *defaults*. Fold f of every setting has the seed
    `config.seed + f`, hence the same initial weights and order of rows. The setting with the best
    mean `metric` ("accuracy" or "cross_entropy", see `evaluate`) is chosen, ties by the other
    metric, then by the order of the grid; the student is trained with it on all rows, with seed
    `config.seed`. A run whose loss is not finite rules its setting out and is reported, not raised.

    halving: drop the worse half of the settings after 2 folds, of the rest after 3, 5, ... (half of
        the folds, rounded up, before each): at 16 settings and 5 folds 48 runs in place of 80. A
        setting that ties with the last one kept is kept. No run is shortened: a setting that only
        learns slowly at first is not mistaken for a bad one.
    outer_folds: also repeat the whole search inside each of that many outer folds, and compare its
        choice with the defaults on the rows left out (`TuneResult.outer`).
    workers: processes to train in, on the same device; the threads of torch are divided among them.
        `make_student` and `teacher` are sent there with cloudpickle.

    The interval of a mean over k folds is Student's, with the variance (1/k + 1/(folds - 1)) s² of
    Nadeau and Bengio (Inference for the generalization error, Machine Learning 52, 2003), because
    the training parts of the folds overlap.

    With `config.run_dir` each result is kept in `run_dir/results`, and the same call goes on from
    them after a crash, to the same result. It leaves `report.json`, `table.md`, `heat_map.png` (the
    first two keys with several values, if there are two) and `refit/student.safetensors`.

    Raises ValueError for arguments that do not fit (a mistyped key with the nearest one),
    CheckpointError for a run_dir of another search or with a damaged file, FloatingPointError if
    every setting diverged or the defaults did in the nested test.
    """
    _check_arguments(data, config, folds, outer_folds, metric, batch_size, workers)
    config = TrainConfig(**_fields(config))  # a subclass may refuse runs that leave no files
    settings = _settings(grid, config)
    distils = config.kd_weight > 0 and outer_folds is not None
    distils |= any(dataclasses.replace(config, **s).kd_weight > 0 for s in settings)
    if teacher is None and distils:
        raise ValueError("teacher is None while a setting has a kd_weight above 0")
    inputs, labels = data
    everything = np.arange(len(labels))
    splits, stratified = _split(labels, everything, folds, config)
    outer_splits: _Splits = []
    inner_splits: list[_Splits] = []
    if outer_folds is not None:
        outer_splits, _ = _split(labels, everything, outer_folds, config)
        inner_splits = [_split(labels, rows, folds, config)[0] for rows, _ in outer_splits]

    folder = None if config.run_dir is None else Path(config.run_dir)
    if folder is not None:
        options = {"folds": folds, "outer_folds": outer_folds, "halving": halving, "metric": metric}
        _check_same_search(
            folder,
            {
                **{f"grid[{key!r}]": list(values) for key, values in grid.items()},
                **{key: v for key, v in _fields(config).items() if key not in FREE_TO_CHANGE},
                **options,
                "batch_size": batch_size,
                "data": _digest({"inputs": inputs, "labels": labels}),
                "splits": _digest_rows(splits + outer_splits + sum(inner_splits, [])),
                "teacher": None if teacher is None else _digest(teacher.state_dict()),
                "student": _digest(_new_student(make_student, config.seed).state_dict()),
            },
        )

    context = _Context(make_student, teacher, inputs, labels, config, batch_size)
    runner = _Runner(context, folder, workers)
    outer = None
    if outer_folds is not None:
        chosen, jobs = [], []
        for index, ((rows, test), inner) in enumerate(zip(outer_splits, inner_splits, strict=True)):
            place = f"outer-{index}"
            scores, alive = _search(runner, place, settings, inner, halving, metric)
            chosen.append(_best(scores, alive, settings, metric))
            jobs += [_Job(f"{place}-test", s, index, rows, test) for s in (chosen[-1], {})]
        outer = _outer_test(chosen, runner.run("outer test", jobs), metric)

    scores, alive = _search(runner, "all", settings, splits, halving, metric)
    best = _best(scores, alive, settings, metric)
    refit = dataclasses.replace(
        config, **best, run_dir=None if folder is None else str(folder / "refit")
    )
    student = _new_student(make_student, config.seed)
    _train(context, refit, student, everything)
    entries = [
        _setting_scores(setting, figures, index not in alive, metric, folds)
        for index, (setting, figures) in enumerate(zip(settings, scores, strict=True))
    ]
    result = TuneResult(best, entries, refit, student, outer, metric, folds, stratified)
    if folder is not None:
        _write_files(folder, result, grid)
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class _Context:
    """What all jobs of a search share; sent to a worker once."""

    make_student: Callable[[], nn.Module]
    teacher: nn.Module | None
    inputs: Tensor
    labels: Tensor
    config: TrainConfig
    batch_size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    place: str  # of the search it belongs to
    setting: Setting  # {}: the defaults
    fold: int
    training_rows: np.ndarray
    test_rows: np.ndarray

    @property
    def key(self) -> str:
        """Name of the job's result; the setting itself stands in the file."""
        text = json.dumps(self.setting, sort_keys=True)
        return f"{self.place}-fold-{self.fold}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class _Runner:
    """Runs jobs here or in other processes; only this process reads and writes their results."""

    def __init__(self, context: _Context, folder: Path | None, workers: int):
        self.context, self.workers = context, workers
        self.folder = None if folder is None else folder / "results"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, title: str, jobs: Sequence[_Job]) -> list[Figures]:
        """The figures of each job, from disk where they are there."""
        results = {}
        for job in jobs:
            if (figures := self._read(job)) is not None:
                results[job.key] = figures
        missing = list({job.key: job for job in jobs if job.key not in results}.values())
        show = self.context.config.progress
        with tqdm(
            total=len(missing), desc=title, unit="run", disable=None if show else True
        ) as bar:
            for key, figures in self._compute(missing):
                results[key] = figures
                self._write(key, figures)
                bar.update()
        return [results[job.key] for job in jobs]

    def _compute(self, jobs: Sequence[_Job]) -> Iterator[tuple[str, Figures]]:
        if self.workers == 1 or not jobs:
            for job in jobs:
                yield job.key, _run_job(self.context, job)
            return
        threads = max(torch.get_num_threads() // self.workers, 1)
        yield from Parallel(
            n_jobs=self.workers,
            backend="loky",
            batch_size=1,
            return_as="generator_unordered",
            initializer=_start_worker,
            initargs=(self.context, threads),
        )(delayed(_run_in_worker)(job) for job in jobs)

    def _read(self, job: _Job) -> Figures | None:
        if self.folder is None:
            return None
        path = self.folder / f"{job.key}.json"
        if not path.exists():
            return None
        try:
            return read_json(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Remove it and run the same command again: only that run is made anew"
            ) from error

    def _write(self, key: str, figures: Figures) -> None:
        if self.folder is not None:
            write_json(self.folder / f"{key}.json", figures)


_worker_context: _Context | None = None


def _start_worker(context: _Context, threads: int) -> None:
    global _worker_context
    _worker_context = context
    torch.set_num_threads(threads)


def _run_in_worker(job: _Job) -> tuple[str, Figures]:
    assert _worker_context is not None
    return job.key, _run_job(_worker_context, job)


def _run_job(context: _Context, job: _Job) -> Figures:
    seed = context.config.seed + job.fold
    config = dataclasses.replace(
        context.config, **job.setting, seed=seed, run_dir=None, progress=False
    )
    student = _new_student(context.make_student, seed)
    about = {"setting": job.setting}
    try:
        return about | _train(context, config, student, job.training_rows, job.test_rows)
    except FloatingPointError as error:
        return about | {"error": str(error)}


def _train(
    context: _Context,
    config: TrainConfig,
    student: nn.Module,
    rows: np.ndarray,
    test_rows: np.ndarray | None = None,
) -> Figures:
    """Train `student` on `rows`; its figures on `test_rows`, if there are any, after the end."""
    train_loader, test_loader = (
        None
        if part is None
        else make_loader(context.inputs[part], context.labels[part], context.batch_size, shuffle)
        for part, shuffle in ((rows, True), (test_rows, False))
    )
    assert train_loader is not None
    result = train(
        dataclasses.replace(config, eval_every=_AT_THE_END),
        student,
        train_loader,
        teacher=context.teacher if config.kd_weight > 0 else None,
        eval_loader=test_loader,
    )
    return {} if test_rows is None else {name: result.history[-1][name] for name in METRICS}


def _new_student(make_student: Callable[[], nn.Module], seed: int) -> nn.Module:
    set_seed(seed)
    return make_student()


def _split(
    labels: Tensor, rows: np.ndarray, folds: int, config: TrainConfig
) -> tuple[_Splits, bool]:
    """The folds of `rows`, and whether classes are stratified."""
    has_label = (labels[rows].reshape(len(rows), -1) != config.ignore_index).any(1).numpy()
    labelled = rows[has_label]
    if len(labelled) < folds:
        raise ValueError(f"{len(labelled)} rows have a label; {folds} folds need as many at least")
    stratified = False
    if labels.dim() == 1:
        counts = np.unique(labels[labelled].numpy(), return_counts=True)[1]
        stratified = bool(counts.min() >= folds)
    kind = StratifiedKFold if stratified else KFold
    splitter = kind(folds, shuffle=True, random_state=config.seed)
    classes = labels[labelled].numpy() if stratified else None
    tests = [labelled[test] for _, test in splitter.split(labelled, classes)]
    return [(np.setdiff1d(rows, test), test) for test in tests], stratified


def _search(
    runner: _Runner,
    place: str,
    settings: Sequence[Setting],
    splits: _Splits,
    halving: bool,
    metric: str,
) -> tuple[list[list[Figures]], list[int]]:
    """Each setting's figures, and the indices of the settings that have those of every fold."""
    stages = [len(splits)]
    while halving and stages[0] > 2:  # nothing is judged on one fold
        stages.insert(0, -(-stages[0] // 2))
    scores: list[list[Figures]] = [[] for _ in settings]
    alive = list(range(len(settings)))
    done = 0
    for stage in stages:
        jobs = [
            _Job(place, settings[index], fold, *splits[fold])
            for fold in range(done, stage)
            for index in alive
        ]
        for job, figures in zip(jobs, runner.run(place, jobs), strict=True):
            scores[settings.index(job.setting)].append(figures)
        done = stage
        if stage < len(splits):
            ranks = {index: _rank(scores[index], metric)[0] for index in alive}
            last_kept = sorted(ranks.values(), reverse=True)[-(-len(alive) // 2) - 1]
            alive = [i for i in alive if ranks[i] >= last_kept and ranks[i] > -math.inf]
    return scores, alive


def _rank(figures: Sequence[Figures], metric: str) -> tuple[float, float]:
    """Mean of the metric, then of the other one; more is better, diverged is -inf."""
    other = next(name for name in METRICS if name != metric)
    if any("error" in entry for entry in figures):
        return -math.inf, -math.inf
    means = [
        METRICS[name] * statistics.fmean(entry[name] for entry in figures)
        for name in (metric, other)
    ]
    return (means[0], means[1]) if all(map(math.isfinite, means)) else (-math.inf, -math.inf)


def _best(
    scores: Sequence[Sequence[Figures]],
    alive: Sequence[int],
    settings: Sequence[Setting],
    metric: str,
) -> Setting:
    best = max(alive, key=lambda index: _rank(scores[index], metric), default=None)
    if best is None or _rank(scores[best], metric)[0] == -math.inf:
        errors = [entry["error"] for figures in scores for entry in figures if "error" in entry]
        first = f"; the first: {errors[0]}" if errors else ""
        raise FloatingPointError(f"every setting of the grid diverged{first}")
    return settings[best]


def _setting_scores(
    setting: Setting, figures: Sequence[Figures], dropped: bool, metric: str, folds: int
) -> SettingScores:
    error = next((entry["error"] for entry in figures if "error" in entry), None)
    values = [entry[metric] for entry in figures if "error" not in entry]
    if error is None and _rank(figures, metric)[0] == -math.inf:
        error = "its figures are not finite"
    if error is not None:
        return SettingScores(setting, values, None, None, False, error)
    mean, half_width = _interval(values, folds)
    return SettingScores(setting, values, mean, half_width, dropped, None)


def _outer_test(chosen: list[Setting], results: Sequence[Figures], metric: str) -> OuterTest:
    for figures in results:
        if "error" in figures:
            raise FloatingPointError(
                f"the nested test diverged with {figures['setting'] or 'the defaults'}: "
                f"{figures['error']}"
            )
    scores = [figures[metric] for figures in results[::2]]
    defaults = [figures[metric] for figures in results[1::2]]
    regret = [METRICS[metric] * (d - s) for d, s in zip(defaults, scores, strict=True)]
    return OuterTest(chosen, scores, defaults, regret, *_interval(regret, len(regret)))


def _interval(values: Sequence[float], folds: int) -> tuple[float, float]:
    """Mean of the scores of some of the folds, half width of its 95 % interval."""
    count = len(values)
    scale = math.sqrt(1 / count + 1 / (folds - 1)) * float(stats.t.ppf(0.975, count - 1))
    return statistics.fmean(values), scale * statistics.stdev(values)


def _settings(grid: Mapping[str, Sequence[Any]], config: TrainConfig) -> list[Setting]:
    """Every combination, the last key changing fastest; each makes a valid config."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"grid is {grid!r}; accepted is a list of values for each of some options")
    accepted = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in _NOT_IN_GRID]
    for key, values in grid.items():
        _check_key(key, accepted, "grid")
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid[{key!r}] is {values!r}; accepted is a list of values")
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise ValueError(f"grid[{key!r}] holds {twice[0]!r} twice")
    settings = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    for setting in settings:
        try:
            dataclasses.replace(config, **setting)
        except ValueError as error:
            raise ValueError(f"grid has the setting {setting}: {error}") from error
    return settings


def _check_key(key: str, accepted: Iterable[str], argument: str) -> None:
    names = sorted(accepted)
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
        raise ValueError(
            f"{argument} has the key {key!r}; the nearest accepted is {near[0]!r}, all are "
            f"{', '.join(names)}"
        )


def _check_arguments(
    data: tuple[Tensor, Tensor],
    config: TrainConfig,
    folds: int,
    outer_folds: int | None,
    metric: str,
    batch_size: int,
    workers: int,
) -> None:
    for name, value, least in (
        ("folds", folds, 2),
        ("outer_folds", 2 if outer_folds is None else outer_folds, 2),
        ("batch_size", batch_size, 1),
        ("workers", workers, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; accepted is an integer of at least {least}")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; accepted is one of {', '.join(METRICS)}")
    inputs, labels = data
    if labels.dtype != torch.int64 or labels.dim() == 0 or len(inputs) != len(labels):
        raise ValueError(
            f"data is inputs of shape {tuple(inputs.shape)} and {labels.dtype} labels of shape "
            f"{tuple(labels.shape)}; accepted are as many int64 labels as there are rows of inputs"
        )
    processes = PartialState().num_processes
    if processes > 1:
        raise ValueError(
            f"launched as {processes} processes; accepted is one, which starts `workers` others"
        )


def _check_same_search(folder: Path, now: dict[str, Any]) -> None:
    path = folder / "search.json"
    now = json.loads(json.dumps(now))  # as it will be read: tuples become lists
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
        return
    try:
        then = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Start again with another run_dir") from error
    hidden = ("data", "splits", "teacher", "student")  # checksums say nothing to a reader
    changed = [
        f"{name} changed"
        if name in hidden
        else f"{name} was {_was(then, name)} and is {_was(now, name)}"
        for name in sorted(then.keys() | now.keys())
        if name not in then or name not in now or then[name] != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"{folder} holds another search: {'; '.join(changed)}. Give another run_dir, or the "
            "arguments it was started with to go on"
        )


def _was(state: dict[str, Any], name: str) -> str:
    return repr(state[name]) if name in state else "absent"


def _fields(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_rows(splits: _Splits) -> str:
    """Which rows are in which fold: another scikit-learn may draw others from the same seed."""
    text = json.dumps([test.tolist() for _, test in splits])
    return hashlib.sha256(text.encode()).hexdigest()


def _write_files(folder: Path, result: TuneResult, grid: Mapping[str, Sequence[Any]]) -> None:
    write_file(folder / "report.json", json.dumps(result.report(), indent=1).encode())
    write_file(folder / "table.md", f"{result.table()}\n".encode())
    axes = [key for key, values in grid.items() if len(values) > 1][:2]
    if len(axes) == 2:
        write_file(folder / "heat_map.png", result.heat_map(*axes))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_interval(entry: SettingScores) -> str:
    if entry.mean is None:
        return "–"
    return f"{entry.mean:.4f} ± {entry.half_width:.4f}"


@one_thread()
def tune_mnist(
    config: MnistConfig, grid: Mapping[str, Sequence[Any]], **options: Any
) -> tuple[TuneResult, dict[str, float]]:
    """`cross_validate` with `options` on the digits of `train_mnist`, whose teacher it takes too.

    Returns its result and the refitted student's figures on the 1,000 digits held out.
    """
    _settings(grid, config)  # an error in it is not worth a teacher's training
    digits = load_digits()
    labels = hide_labels(
        digits.train_labels, config.labels_per_class, config.seed, config.ignore_index
    )

    def make_student() -> nn.Module:
        return make_mnist_student(config.hidden_units)

    result = cross_validate(
        make_student,
        find_teacher(config, digits),
        (digits.train_images, labels),
        config,
        grid=grid,
        batch_size=config.batch_size,
        **options,
    )
    test = make_loader(digits.test_images, digits.test_labels, EVAL_BATCH, shuffle=False)
    return result, evaluate(result.student.cpu(), test)
