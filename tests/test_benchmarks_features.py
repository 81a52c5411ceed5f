"""benchmarks.features measures what it says."""

import json

import pytest
import torch

from benchmarks import features
from benchmarks.run import CheckFailed


@pytest.fixture(autouse=True)
def threads():
    """The command sets PyTorch's number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("metric", sorted(features.LINES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contestant_is_the_same_function(metric, dtype):
    """Of torch.compile there is one case below: a compilation takes seconds."""
    kind = "features" if metric in ("smooth_l1", "normalised", "gaussian_nll") else "joint"
    case = features.Case(kind, metric, "tiny", dtype, rows=3, vocab=10)
    inputs = features.make_inputs(case)
    for name in (features.OURS, features.EAGER):
        features.check(case, name, features.CONTESTANTS[name](case), inputs)


def test_a_wrong_gradient_is_not_timed(monkeypatch, tmp_path):
    def spoiled(case):
        step = features._ours(case)
        return lambda inputs: step(inputs) * 1.001

    monkeypatch.setitem(features.CONTESTANTS, features.OURS, spoiled)
    case = features.Case("joint", "l2", "tiny", rows=3)
    with pytest.raises(CheckFailed, match="joint/l2/tiny/float32/3x100: kdkernels: relative error"):
        features.measure(case, [features.OURS], 0.0)
    monkeypatch.setattr(features, "CASES", [case])
    out = tmp_path / "features.json"
    assert features.main(["--no-compile", "--seconds", "0", "--out", str(out)]) == 1
    saved = json.loads(out.read_text())
    assert not saved["cases"] and len(saved["failed"]) == 1


def test_the_file(monkeypatch, tmp_path):
    case = features.Case("features", "cosine", "tiny", rows=3)
    monkeypatch.setattr(features, "CASES", [case])
    out = tmp_path / "features.json"
    assert features.main(["--seconds", "0", "--threads", "1", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())["cases"]
    assert found["case"] == case.name and found["rounds"] == features.run.MIN_ROUNDS
    assert set(found["contestants"]) == set(features.CONTESTANTS)
    assert found["contestants"][features.OURS]["of_ours"] == 1
