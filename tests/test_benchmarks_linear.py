"""benchmarks.linear measures what it says."""

import json

import pytest
import torch

from benchmarks import linear
from benchmarks.run import CheckFailed

# A vocabulary of 300 and widths that differ: the floor counts each product by its own.
TINY = ["--vocab", "300", "--rows", "40", "--hidden", "24", "--rounds", "1"]


@pytest.fixture(autouse=True)
def threads():
    """The command sets PyTorch's number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_flops_of_the_floor():
    assert linear.Case("jsd", "float32", 10, 3, 7).flops == 2 * 10 * 7 * (3 * 3 + 576)
    assert linear.Case("ce", "float32", 10, 3, 7).flops == 2 * 10 * 7 * 9


@pytest.mark.parametrize("loss", ["jsd", "ce"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contestant_passes_its_check(loss, dtype):
    case = linear.Case(loss, dtype, 40, 24, 300)
    slow = {linear.PRODUCTS, "torch.compile", "Liger"}
    names = [n for n in linear.names_of(case) if n.removesuffix(linear.IN_FLOAT32) not in slow]
    assert ("eager, float32" in names) == (dtype == "bfloat16")
    for name in names:
        errors = linear.check(case, name)
        if name == linear.OURS:
            assert errors["loss"] < 1e-5


def test_a_wrong_gradient_is_not_timed(monkeypatch, tmp_path):
    def wrong(case):
        step = linear._ours(case)

        def spoiled(inputs):
            loss, (by_hidden, by_weight) = step(inputs)
            return loss, (by_hidden, by_weight * 1.01)

        return spoiled

    monkeypatch.setitem(linear.CONTESTANTS["ce"], linear.OURS, wrong)
    with pytest.raises(CheckFailed, match="ce/bfloat16/40x24: kdkernels: relative errors"):
        linear.check(linear.Case("ce", "bfloat16", 40, 24, 300), linear.OURS)
    out = tmp_path / "linear.json"
    options = ["--loss", "ce", "--dtype", "bfloat16", "--only", "eager", "--out", str(out)]
    assert linear.main(TINY + options) == 1
    saved = json.loads(out.read_text())
    assert not saved["cases"] and len(saved["failed"]) == 1


def test_peak_memory_and_the_file(tmp_path):
    """Eager holds several float32 tensors of 64 × 49152 logits (12 MiB each), ours one and a half
    of them, in a chunk of all 64 rows; both the gradient of the weight.
    """
    out = tmp_path / "linear.json"
    options = ["--loss", "jsd", "--dtype", "float32", "--only", "eager", "--memory"]
    sizes = ["--rows", "64", "--hidden", "8", "--rounds", "1"]
    assert linear.main([*options, *sizes, "--out", str(out)]) == 0
    (case,) = json.loads(out.read_text())["cases"].values()
    assert case["case"] == "jsd/float32/64x8"
    found = case["contestants"]
    assert found[linear.PRODUCTS]["of_products"] == 1 and found[linear.OURS]["of_ours"] == 1
    assert found[linear.OURS]["errors"]["weight"] < 1e-5
    peaks = {name: x["peak_bytes"] for name, x in found.items() if "peak_bytes" in x}
    assert peaks[linear.OURS] < 40 * linear.MIB < 60 * linear.MIB < peaks["eager"]
