"""Layers by path: patterns, wrappers, and hooks that leave no trace."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdkernels.trainer.layers import captured, find_layers, named_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        self.gru = nn.GRU(4, 2, batch_first=True)
        self.head = nn.Linear(2, 5)

    def forward(self, x):
        return self.head(self.gru(self.layers(self.stem(x)))[0])


INPUTS = torch.arange(24.0).reshape(2, 4, 3) / 24


def test_paths_and_patterns():
    net = Net()
    assert find_layers(net, "layers.1") == ["layers.1"]
    assert find_layers(net, "layers.*") == ["layers.0", "layers.1", "layers.2"]  # no grandchildren
    assert find_layers(net, "layers.[02].0") == ["layers.0.0", "layers.2.0"]
    assert find_layers(net, "*e?d") == ["head"]
    with pytest.raises(ValueError, match=r"student has no layer 'layer.1'; the nearest are layers"):
        find_layers(net, "layer.1", what="student")
    with pytest.raises(ValueError, match=r"no layer 'layers.\*.7'; the nearest are layers"):
        find_layers(net, "layers.*.7")
    with pytest.raises(ValueError, match="it has no submodule"):
        find_layers(nn.Linear(1, 1), "x")


def test_outputs_keep_their_graph_and_the_hooks_go_away():
    net = Net()
    with captured(net, ["stem", "gru", "stem"]) as features:
        logits = net(INPUTS)
        outputs = features.take()
        assert torch.equal(outputs["stem"], net.stem(INPUTS))
        assert outputs["gru"].shape == (2, 4, 2)  # the first of (outputs, state)
        torch.testing.assert_close(net.head(outputs["gru"]), logits)
        outputs["stem"].sum().backward()
        assert net.stem.weight.grad is not None and net.head.weight.grad is None
    assert all(not module._forward_hooks for module in net.modules())
    with pytest.raises(ZeroDivisionError), captured(net, ["stem"]):
        raise ZeroDivisionError
    assert not net.stem._forward_hooks


def test_a_layer_that_runs_twice_or_never():
    net = Net()
    with captured(net, ["stem"], what="teacher") as features:
        with pytest.raises(RuntimeError, match="layer 'stem' of teacher ran 0 times"):
            features.take()
        net(INPUTS), net(INPUTS)
        with pytest.raises(RuntimeError, match="layer 'stem' of teacher ran 2 times"):
            features.take()
        checkpoint(net, INPUTS, use_reentrant=False).sum().backward()  # runs it again
        features.clear()
        net(INPUTS)
        assert list(features.take()) == ["stem"]


def test_a_layer_that_returns_no_tensor():
    class Words(nn.Module):
        def forward(self, x):
            return {"x": x}

    net = nn.Sequential(Words())
    with captured(net, ["0"]) as features:
        net(INPUTS)
        with pytest.raises(TypeError, match="layer '0' of model returned a dict"):
            features.take()


@pytest.mark.parametrize("way", ["wrapped", "in place", "part", "before"])
def test_compiled_models(way):
    """A graph that was compiled without the hooks would never run them."""
    net, plain = Net(), Net()
    if way == "part":
        net.layers = torch.compile(net.layers, backend="aot_eager")
        model = net
    elif way == "in place":
        net.compile(backend="aot_eager")
        model = net
    else:
        model = torch.compile(net, backend="aot_eager")
    assert list(named_layers(model)) == list(named_layers(plain))
    if way != "before":
        model(INPUTS)
    with captured(model, ["layers.*"]) as features:
        for _ in range(2):
            features.clear()
            model(INPUTS)
            outputs = features.take()
        assert list(outputs) == ["layers.0", "layers.1", "layers.2"]
        torch.testing.assert_close(outputs["layers.1"], plain.layers[:2](plain.stem(INPUTS)))
        outputs["layers.1"].square().sum().backward()
        plain.layers[:2](plain.stem(INPUTS)).square().sum().backward()
        torch.testing.assert_close(net.stem.weight.grad, plain.stem.weight.grad)
    model(INPUTS)
    assert features.outputs == {}


def test_ddp_and_autocast(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        net = Net()
        model = DistributedDataParallel(net)
        assert list(named_layers(model)) == list(named_layers(net))
        with captured(model, ["layers.0"]) as features:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(INPUTS).float().sum()
            (output,) = features.take().values()
            assert output.dtype == torch.bfloat16
            (loss + output.float().sum()).backward()
        assert net.stem.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()
