"""benchmarks.relations measures what it says."""

import json

import pytest
import torch

from benchmarks import relations
from benchmarks.run import CheckFailed


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loss", relations.LOSSES)
def test_contestants_pass_their_check(loss):
    case = next(case for case in relations.CASES if case.loss == loss)
    for name in (relations.OURS, relations.EAGER):
        assert relations.check(case, name, relations.loss_of(case, name)) < 1e-5


def test_a_wrong_gradient_is_not_timed(monkeypatch, tmp_path):
    ours, eager = relations.LOSSES["dist"]
    monkeypatch.setitem(relations.LOSSES, "dist", (lambda s, t: ours(s * 1.01, t), eager))
    case = relations.Case("dist", (64, 100))
    with pytest.raises(CheckFailed, match="dist 64x100: kdkernels: relative errors"):
        relations.check(case, relations.OURS, relations.loss_of(case, relations.OURS))
    out = tmp_path / "relations.json"
    assert relations.main(["--case", "dist 64x100", "--no-compile", "--out", str(out)]) == 1
    saved = json.loads(out.read_text())
    assert not saved["cases"] and len(saved["failed"]) == 1


def test_what_is_measured(tmp_path):
    """Eager's angles hold 64³ numbers several times over, ours a few 64² ones."""
    out = tmp_path / "relations.json"
    options = ["--no-compile", "--seconds", "0", "--out", str(out)]
    assert relations.main(["--case", "rkd angle 64x100", *options]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    found = case["contestants"]
    assert found["kdkernels"]["of_ours"] == 1 and case["rounds"] == 3
    assert found["kdkernels"]["peak_bytes"] < 4 * relations.MIB < found["eager"]["peak_bytes"]
    assert found["kdkernels"]["operations"] < found["eager"]["operations"]
