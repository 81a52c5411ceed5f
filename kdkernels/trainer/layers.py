"""Named layers of a model by module path, and hooks that hand over what they return.

with captured(model, ["layer3.*"]) as features:
    logits = model(inputs)
    outputs = features.take()       # {"layer3.0": Tensor, "layer3.1": Tensor}
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_WILD = frozenset("*?[")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule by the path it has in the plain model: what DistributedDataParallel and
    torch.compile put around a model or a part of it has no place in a path.
    """
    layers: dict[str, nn.Module] = {}
    _walk(model, "", layers)
    return layers


def _walk(module: nn.Module, path: str, layers: dict[str, nn.Module]) -> None:
    while (inner := _inside(module)) is not None:
        module = inner
    if path:
        layers[path] = module
    for name, child in module.named_children():
        _walk(child, f"{path}.{name}" if path else name, layers)


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, DistributedDataParallel):
        return module.module
    return getattr(module, "_orig_mod", None)  # of torch.compile(module)


def find_layers(model: nn.Module, path: str, *, what: str = "model") -> list[str]:
    """Paths of the layers that `path` names, in the model's order.

    `path` is a module path ("layer3.1") or a pattern in which `*`, `?` and `[...]` stand for
    characters of one component: "layer*.1", "encoder.layers.*" (its direct children only).

    Raises ValueError if there is none, with the nearest paths there are.
    """
    layers = named_layers(model)
    if path in layers:
        return [path]
    if _WILD & set(path):
        pattern = path.split(".")
        found = [
            name
            for name in layers
            if len(parts := name.split(".")) == len(pattern)
            and all(map(fnmatch.fnmatchcase, parts, pattern))
        ]
        if found:
            return found
    near = difflib.get_close_matches(path, layers, n=5, cutoff=0.3) or list(layers)[:5]
    nearest = ", ".join(near) if near else "none: it has no submodule"
    raise ValueError(f"{what} has no layer {path!r}; the nearest are {nearest}")


class Captured:
    """What the hooks of `captured` were handed since the last `take`."""

    def __init__(self, names: Sequence[str], what: str):
        self.names, self.what = list(names), what
        self.outputs: dict[str, list[Any]] = {}

    def clear(self) -> None:
        """Before a forward: gradient checkpointing runs layers again in the backward."""
        self.outputs.clear()

    def take(self) -> dict[str, Tensor]:
        """The layers' outputs of one forward; of a tuple or list, its first entry.

        Raises RuntimeError for a layer that did not run, or ran more than once; TypeError for one
        that returned something else than a tensor.
        """
        taken = {}
        for name in self.names:
            runs = self.outputs.get(name, [])
            if len(runs) != 1:
                raise RuntimeError(
                    f"layer {name!r} of {self.what} ran {len(runs)} times in one forward; accepted "
                    "is a layer that runs once"
                )
            output = runs[0]
            if isinstance(output, (tuple, list)) and output:
                output = output[0]
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {name!r} of {self.what} returned a {type(runs[0]).__name__}; accepted "
                    "is a tensor, or a tuple or list that starts with one"
                )
            taken[name] = output
        self.outputs.clear()
        return taken


@contextmanager
def captured(model: nn.Module, paths: Sequence[str], *, what: str = "model") -> Iterator[Captured]:
    """Forward hooks on the layers `paths` name, for as long as the context lasts.

    The model may be compiled (`torch.compile(model)` or `model.compile()`, before or after: graphs
    that exist are thrown away on the way in and out, since they were made without the hooks),
    wrapped in DistributedDataParallel, and run under autocast.

    Raises ValueError for a path without a layer, with the nearest paths.
    """
    layers = named_layers(model)
    names = list(
        dict.fromkeys(name for path in paths for name in find_layers(model, path, what=what))
    )
    result = Captured(names, what)
    handles = [
        layers[name].register_forward_hook(_recorder(result.outputs, name)) for name in names
    ]
    compiled = bool(names) and any(map(_is_compiled, model.modules()))
    if compiled:
        torch.compiler.reset()
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
        result.outputs.clear()
        if compiled:
            torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _recorder(outputs: dict[str, list[Any]], name: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    return record
