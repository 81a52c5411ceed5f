"""benchmarks.similarity measures what it says."""

import json

import pytest
import torch

from benchmarks import similarity
from benchmarks.run import CheckFailed

# Own keys, and a queue: what the two eager branches are for.
TINY = [similarity.Case("rbf", 40, 0, 8), similarity.Case("pkt", 30, 50, 8)]


@pytest.fixture(autouse=True)
def threads():
    """The command sets PyTorch's number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_contestants_pass_their_check():
    for case in TINY:
        for name in (similarity.OURS, similarity.EAGER):
            similarity.check(case, name)


def test_a_wrong_gradient_is_not_timed(monkeypatch, tmp_path):
    right = similarity.make_step

    def wrong(case, name):
        step = right(case, name)
        return lambda x: (step(x)[0], step(x)[1] * 1.01)

    monkeypatch.setattr(similarity, "make_step", wrong)
    with pytest.raises(CheckFailed, match="gradient"):
        similarity.check(TINY[0], similarity.OURS)
    monkeypatch.setattr(similarity, "CASES", TINY)
    out = tmp_path / "similarity.json"
    assert (
        similarity.main(["--only", "eager", "--rounds", "1", "--threads", "1", "--out", str(out)])
        == 1
    )
    assert len(json.loads(out.read_text())["failed"]) == 2


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(similarity, "CASES", TINY)
    out = tmp_path / "similarity.json"
    assert (
        similarity.main(["--only", "eager", "--rounds", "1", "--threads", "1", "--out", str(out)])
        == 0
    )
    cases = json.loads(out.read_text())["cases"]
    assert [case["case"] for case in cases] == [case.name for case in TINY]
    assert all(x["operations"] > 5 for case in cases for x in case["contestants"].values())
    assert "× ours" in capsys.readouterr().out
