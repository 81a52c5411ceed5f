"""The benchmarks measure what they say: gate, order, byte counts, files, memory figure."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import kdkernels
from benchmarks import __main__ as command
from benchmarks import cases, report, run

HERE = [name for name, reason in run.available().items() if reason is None]
# Slow to compile; JSD only; GPUs only.
LEFT_OUT = ("torch.compile", "eager, probabilities", "liger")
TINY = cases.Case("jsd", "float32", 6, 40, ("reference, fresh", "eager", "torch.add"))


@pytest.fixture
def threads():
    """The command sets PyTorch's number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(monkeypatch, tmp_path, some_cases, *arguments):
    monkeypatch.setattr(command, "QUICK", some_cases)
    out = tmp_path / "out" / "cpu"
    status = command.main(["--quick", "--seconds", "0.01", "--out", str(out), *arguments])
    return status, json.loads(out.with_name("cpu.json").read_text()), out.with_name("cpu.png")


def wrong(monkeypatch, name, spoil):
    """Put a contestant in place whose loss and gradient went through `spoil`."""
    true = cases.CONTESTANTS[name]

    def make(case):
        step = true.make(case)
        return lambda student, inputs: spoil(*step(student, inputs))

    monkeypatch.setitem(cases.CONTESTANTS, name, replace(true, make=make))


def test_byte_counts():
    case = cases.Case("forward_kl", "bfloat16", 512, 32000, ())
    assert case.gradient_bytes == 32_768_000
    assert case.bytes == 98_304_000  # student, teacher, gradient: two bytes each
    assert replace(case, dtype="float32").bytes == 196_608_000


def test_every_divergence_has_its_eager_lines_and_a_case():
    assert set(cases.EAGER) == set(kdkernels.divergences.DIVERGENCES)
    assert {case.divergence for case in cases.FULL} == set(cases.EAGER)
    assert len({case.name for case in cases.FULL}) == len(cases.FULL)


@pytest.mark.parametrize("divergence", cases.EAGER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contestant_passes_its_check(divergence, dtype):
    names = [name for name in HERE if name not in LEFT_OUT]
    case = cases.Case(divergence, dtype, 5, 300, tuple(names))
    steps = {name: cases.CONTESTANTS[name].make(case) for name in names}
    errors = run.check(case, steps, cases.make_inputs(case))
    assert list(errors) == names


def test_truth_by_hand():
    """Forward KL of two columns in float64, T = 2."""
    case = cases.Case("forward_kl", "float32", 1, 2, ())
    inputs = cases.make_inputs(case)
    p, q = (
        np.exp(x := logits.detach().double().numpy()[0] / 2) / np.exp(x).sum()
        for logits in (inputs.student, inputs.teacher)
    )
    loss, gradient = cases.truth(case, inputs)
    assert loss.item() == pytest.approx(4 * (q * np.log(q / p)).sum(), rel=1e-12)
    assert gradient.numpy()[0] == pytest.approx(2 * (p - q), rel=1e-12)


def test_truth_in_parts_is_the_whole():
    case = cases.Case("dkd", "float32", 9, 2**20, ())
    inputs = cases.make_inputs(case)
    loss, gradient = cases.truth(case, inputs)
    student = inputs.student.detach().double().requires_grad_()
    whole = cases.dkd(student, inputs.teacher.double(), inputs.labels)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, student)[0])


def test_command_writes_table_json_and_plot(monkeypatch, tmp_path, capsys, threads):
    names = tuple(name for name in HERE if name not in ("torch.compile", "liger"))
    survey = replace(
        TINY, divergence="renyi", survey=True, contestants=("reference, fresh", "eager")
    )
    profiled = replace(TINY, contestants=names, profile=True)
    status, results, png = start(monkeypatch, tmp_path, [profiled, survey], "--threads", "1")
    assert status == 0
    assert results["threads"] == 1 and results["versions"]["torch"] == torch.__version__
    assert results["machine"]["cores"] >= 1 and results["machine"]["transparent_hugepages"]
    assert results["date"] and results["failed"] == []
    first, second = results["cases"]
    assert first["case"] == "jsd/float32/6x40" and first["bytes"] == 3 * 4 * 6 * 40
    assert first["rounds"] >= run.MIN_ROUNDS and first["disturbance"] < results["machine"]["cores"]
    assert set(first["contestants"]) == set(names)
    for name, contestant in first["contestants"].items():
        ms = contestant["ms"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
        assert contestant["ns_per_element"] == pytest.approx(ms["p50"] * 1e6 / 240)
        assert contestant["gb_per_s"] == pytest.approx(first["bytes"] / ms["p50"] / 1e6)
        assert contestant["allocation"] == cases.CONTESTANTS[name].allocation
    assert sum(first["contestants"]["eager"]["ops"].values()) > 10
    pair = report.ratio(second, "reference, fresh", "eager")
    assert 0 < pair["p20"] <= pair["p50"] <= pair["p80"]
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "jsd/float32/6x40" in printed and "in place" in printed and "written:" in printed

    assert command.main(["--markdown", str(png.with_suffix(".json"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| renyi/float32/6x40 |") for line in lines)


@pytest.mark.skipif("cpp, fresh" not in HERE, reason="the C++ library is not built")
def test_cpp_is_one_op_each_way():
    for name in ("cpp, fresh", "cpp, in place"):
        step = cases.CONTESTANTS[name].make(TINY)
        assert report.own_ops(run.count_ops(step, cases.make_inputs(TINY))) == 2


def one_column(loss, gradient):
    gradient = gradient.clone()
    gradient[-1, 0] += 0.01 * gradient[-1].norm()
    return loss, gradient


@pytest.mark.parametrize(
    "spoil",
    [
        one_column,
        lambda loss, gradient: (loss * 1.001, gradient),
        lambda loss, gradient: (loss, gradient * math.nan),
        lambda loss, gradient: (loss * math.nan, gradient),
    ],
    ids=["one column of the gradient", "loss", "NaN gradient", "NaN loss"],
)
def test_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys, threads, spoil):
    wrong(monkeypatch, "reference, fresh", spoil)
    right = replace(TINY, rows=7, contestants=("eager",))
    status, results, _ = start(monkeypatch, tmp_path, [TINY, right])
    assert status == 1
    assert [result["case"] for result in results["cases"]] == [right.name]
    assert len(results["failed"]) == 1 and "reference, fresh" in results["failed"][0]
    printed = capsys.readouterr().out
    assert "CHECK FAILED, not timed: jsd/float32/6x40: reference, fresh" in printed
    assert f"{right.name}  T=2" in printed and f"{TINY.name}  T=2" not in printed


def test_nothing_right_leaves_no_plot(monkeypatch, tmp_path, threads):
    wrong(monkeypatch, "eager", lambda loss, gradient: (loss * 2, gradient))
    status, results, png = start(monkeypatch, tmp_path, [TINY])
    assert status == 1 and results["cases"] == [] and not png.exists()


def test_wrong_baseline_is_not_timed(monkeypatch):
    wrong(monkeypatch, "eager", lambda loss, gradient: (loss, gradient / cases.TEMPERATURE))
    steps = {"eager": cases.CONTESTANTS["eager"].make(TINY)}
    with pytest.raises(run.CheckFailed, match="eager: relative error of the gradient"):
        run.check(TINY, steps, cases.make_inputs(TINY))


def test_contestants_alternate_on_fresh_logits():
    inputs = cases.make_inputs(TINY)
    calls = []

    def contestant(name):
        def step(student, inputs):
            assert torch.equal(student, inputs.student) and not student.is_leaf
            calls.append(name)
            student.detach().zero_()  # as in place: the next one must not see it
            return student, student

        return step

    samples = run.measure({name: contestant(name) for name in "ABC"}, inputs, seconds=0)
    assert calls == list("ABC") * (run.WARM_UP + run.MIN_ROUNDS)
    assert all(len(times) == run.MIN_ROUNDS for times, _ in samples.values())


def test_ratios_are_taken_round_by_round():
    times = {"eager": [2.0, 40.0, 2.0], "cpp, fresh": [1.0, 10.0, 1.0]}
    (pair,) = run.ratios(times)
    assert (pair["baseline"], pair["ours"], pair["p50"]) == ("eager", "cpp, fresh", 2.0)


def synthetic(case, pairs, peaks, isa="avx512"):
    """Results with these medians of baseline / ours and these peaks in MiB."""
    ratios = [
        {"ours": ours, "baseline": baseline, "p20": value, "p50": value, "p80": value}
        for (ours, baseline), value in pairs.items()
    ]
    contestants = {name: {"peak_bytes": peak * report.MIB} for name, peak in peaks.items()}
    result = {"case": case.name, "rows": case.rows, "vocab": case.vocab, "ratios": ratios}
    result |= {"gradient_bytes": case.gradient_bytes, "contestants": contestants}
    return {"threads": 2, "machine": {"isa": isa}, "cases": [result]}


def test_thresholds_hide_no_miss():
    case = cases.Case("forward_kl", "float32", 512, 32000, ())  # one gradient is 62.5 MiB
    pairs = {
        ("cpp, in place", "eager"): 19.9,
        ("cpp, fresh", "eager"): 8.0,
        ("cpp, in place", "torch.add"): 1 / 1.6,
    }
    run_ = synthetic(case, pairs, {"cpp, fresh": 66, "cpp, in place": 4.2})
    entries = report.thresholds(run_)
    assert {entry["what"]: entry["met"] for entry in entries} == {
        "eager / cpp, in place": False,
        "eager / cpp, fresh": True,
        "cpp, in place / torch.add": False,
        "peak memory beyond the inputs: cpp, fresh": True,
        "peak memory beyond the inputs: cpp, in place": False,
    }
    printed = report.threshold_table(run_ | {"thresholds": entries})
    assert printed.count("NOT MET") == 3 and printed.endswith("2 of 5 met, 3 not met.")
    without_avx512 = report.thresholds(synthetic(case, pairs, {}, isa="avx2"))
    assert all("torch.add" not in entry["what"] for entry in without_avx512)


def test_peak_memory_counts_what_a_contestant_allocates():
    case = cases.Case("forward_kl", "float32", 64, 32000, ())
    assert run.peak_memory(case, "torch.add", 2) < report.MIB
    # Both scaled logits, both log-probabilities and more, of which some are gone by the time of the
    # peak.
    assert run.peak_memory(case, "eager", 2) > 4 * case.gradient_bytes


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        run.write_whole(path, "not bytes")
    assert path.read_bytes() == b"old"
    run.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--case", "hinge/*"])
    assert "no case fits --case hinge/*" in capsys.readouterr().err


def test_large_case_in_its_own_process_is_checked_too():
    large = replace(TINY, contestants=("eager",), large=True)
    result = run.run_case(large, ["eager"], seconds=0.01, threads=1)
    assert result["case"] == large.name and result["contestants"]["eager"]["peak_bytes"] >= 0
    other_loss = replace(large, divergence="forward_kl")
    with pytest.raises(run.CheckFailed, match="eager, probabilities: relative error of the loss"):
        run.run_case(other_loss, ["eager, probabilities"], seconds=0.01, threads=1)
