"""python -m benchmarks.gpu without a GPU: its checks, its books and its verdicts, on the CPU.

Everything but CUDA events and the device's own figures runs here as it does there.
"""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, gpu, gpu_checks, gpu_linear, report, roofline_model, run
from kdkernels.divergences import DIVERGENCES

CASE = cases.Case("jsd", "bfloat16", 6, 200, ("cpp, fresh", "cpp, in place", "eager", "torch.add"))
SURVEY = replace(CASE, divergence="tvd", survey=True)
SOFTMAX = replace(CASE, divergence="softmax", contestants=("cpp, fresh", "eager"))
GROUPS = [gpu_checks.Group("forward_kl", "bfloat16"), gpu_checks.Group("softmax", "bfloat16")]
LINEAR = gpu_linear.LinearCase("jsd", 12, 70, 16)
GPU = {
    "name": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "multiprocessors": 132,
    "memory_gib": 79.1,
    "l2_mib": 50.0,
}

pytestmark = pytest.mark.skipif(
    run.available()["cpp, fresh"] is not None, reason="the C++ library is not built"
)


class HostClock:
    """DeviceClock's functions on the host, where calls are finished when they return."""

    def __init__(self):
        self.waits = 0

    def prepare(self):
        pass

    def mark(self):
        now = time.perf_counter()
        return SimpleNamespace(elapsed_time=lambda stop: (stop.now - now) * 1e3, now=now)

    def wait(self):
        self.waits += 1

    def busy_seconds(self):
        return 2e-3


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The command on this machine's CPU, over small shapes; returns (status, results, printed)."""
    environment = run.environment(1)
    environment["machine"]["gpu"] = GPU
    environment["versions"]["triton"] = None
    monkeypatch.setattr(gpu, "environment", lambda: environment)
    monkeypatch.setattr(gpu, "refusal", lambda: None)
    monkeypatch.setattr(gpu, "DeviceClock", HostClock)
    monkeypatch.setattr(gpu, "device_copy", lambda clock: 3e12)
    monkeypatch.setattr(gpu, "GPU_QUICK", [CASE, SURVEY, SOFTMAX])
    monkeypatch.setattr(gpu_linear, "QUICK", (LINEAR,))
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_checks, "SHAPES", ((5, 33),))
    monkeypatch.setattr(gpu_checks, "groups", lambda: GROUPS)
    out = tmp_path / "out" / "gpu"

    def start(*arguments):
        status = gpu.main(["--quick", "--seconds", "0.01", "--out", str(out), *arguments])
        return status, json.loads(out.with_name("gpu.json").read_text()), out.with_name("gpu.png")

    return start


def test_a_machine_without_a_gpu_is_refused_in_plain_words(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", str(tmp_path / "gpu")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m benchmarks.gpu has nothing to measure: no CUDA device: torch")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_no_backend_serves_is_refused_with_every_reason(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "refusal", lambda: None)
    reasons = {f"{b}, fresh": f"{b} is broken" for b in gpu.BACKENDS}
    monkeypatch.setattr(run, "available", lambda device: reasons)
    assert gpu.main([]) == 2
    assert "cpp: cpp is broken; triton: triton is broken" in capsys.readouterr().err


def test_one_command_checks_times_and_writes(host, monkeypatch, capsys):
    predicted = {CASE.name: {"cpp, fresh": {"low": 0.2, "ms": 0.25, "high": 0.3}}}
    monkeypatch.setattr(gpu, "predictions", lambda case, _: predicted.get(case.name, {}))
    status, results, png = host()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert results["failed"] == [] and results["not_timed"] == []
    assert "not measured: " not in printed  # every contestant of these cases is here
    assert results["checks"]["forward_kl/bfloat16"]["checks"] == 19
    assert results["checks"]["softmax/bfloat16"]["failed"] == []
    first, second, third = results["cases"]
    assert first["bytes"] == 3 * 2 * 6 * 200 and third["bytes"] == 5 * 2 * 6 * 200
    for name, contestant in first["contestants"].items():
        ms = contestant["ms"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"], name
        assert contestant["gb_per_s"] == pytest.approx(first["bytes"] / ms["p50"] / 1e6)
        assert contestant["host_ms"] > 0
    mine = first["contestants"]["cpp, fresh"]
    assert mine["predicted_ms"] == {"low": 0.2, "ms": 0.25, "high": 0.3}
    assert "predicted_ms" not in second["contestants"]["cpp, fresh"]
    (linear,) = results["linear"]
    assert set(linear["contestants"]) == {"cpp, chunks", "eager"}
    assert set(linear["absent"]) == {"triton, chunks", "triton, low_memory"}
    assert 0 < linear["contestants"]["cpp, chunks"]["gradient_error"] < gpu_linear.LIMIT
    assert "linear jsd/bfloat16/12x70x16" in printed
    assert "0.250 (0.200-0.300)" in printed and "device copy: 3000 GB/s" in printed
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "every check passed; 0 cases not timed" in printed


def test_a_failing_check_is_told_and_ends_with_1(host, monkeypatch, capsys):
    bad = gpu_checks.Check("jsd/float32", "cpp", "5x33", "loss", error=float("nan"), limit=1e-5)
    good = replace(bad, error=1e-6)
    monkeypatch.setattr(gpu_checks, "run_all", lambda *_: {"jsd/float32": [good, bad]})
    status, results, _ = host()
    assert status == 1 and len(results["failed"]) == 1
    assert "CHECK FAILED: jsd/float32 5x33 cpp: loss: relative error nan" in capsys.readouterr().out
    assert results["checks"]["jsd/float32"]["checks"] == 2


def test_a_wrong_result_is_not_timed(host, monkeypatch):
    true = cases.CONTESTANTS["cpp, fresh"]

    def make(case):
        step = true.make(case)
        return lambda student, inputs: tuple(1.1 * x for x in step(student, inputs))

    monkeypatch.setitem(cases.CONTESTANTS, "cpp, fresh", replace(true, make=make))
    status, results, _ = host("--case", "jsd/*")
    assert status == 1 and results["cases"] == []
    assert "cpp, fresh: relative error of the loss" in results["failed"][0]


def test_softmax_is_checked_before_it_is_timed(host, monkeypatch):
    monkeypatch.setattr(torch, "softmax", lambda x, dim: 1.1 * torch.nn.functional.softmax(x, dim))
    with pytest.raises(run.CheckFailed, match="softmax/bfloat16/6x200: cpp, fresh"):
        gpu.time_case(SOFTMAX, ["cpp, fresh"], 0, HostClock())


def test_what_the_time_does_not_reach_is_told(host, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TIMINGS", -1)
    monkeypatch.setattr(gpu, "CHECKS", 0)
    status, results, _ = host()
    assert status == 1 and results["cases"] == []
    linear = "linear jsd/bfloat16/12x70x16"
    assert results["not_timed"] == [CASE.name, SURVEY.name, SOFTMAX.name, linear]
    assert all("not checked: no time was left" in text for text in results["failed"])
    assert f"not timed: {CASE.name}" in capsys.readouterr().out


def test_rounds_alternate_and_wait_once_each():
    inputs, clock, calls = cases.make_inputs(CASE), HostClock(), []

    def contestant(name):
        def step(student, inputs):
            assert torch.equal(student, inputs.student) and not student.is_leaf
            calls.append(name)
            student.detach().zero_()  # as in place: the next one must not see it

        return step

    samples = gpu.measure({name: contestant(name) for name in "AB"}, inputs, 0, clock)
    rounds = run.WARM_UP + run.MIN_ROUNDS
    assert calls == list("AB") * rounds and clock.waits == rounds
    assert all(len(t) == len(h) == run.MIN_ROUNDS for t, h in samples.values())


def test_every_divergence_dtype_and_kernel_has_its_check_and_case():
    ops = {group.op for group in gpu_checks.groups()}
    assert ops == {*DIVERGENCES, gpu_checks.SOFTMAX, *gpu_checks.LINEAR}
    assert {100, 32000, 50257, 128256} == {vocab for _, vocab in gpu_checks.SHAPES}
    assert {case.divergence for case in cases.GPU} == ops - set(gpu_checks.LINEAR)
    names = {name for case in cases.GPU for name in case.contestants}
    assert {c for c in cases.CONTESTANTS if c.startswith(("cpp", "triton"))} <= names
    assert {"eager", "torch.compile", "liger", "torch.add"} <= names
    assert len({case.name for case in cases.GPU}) == len(cases.GPU)


@pytest.mark.parametrize("group", gpu_checks.groups(), ids=lambda group: group.name)
def test_every_check_passes_on_the_cpu(group):
    """The same comparisons that the GPU's kernels must pass, and the reference passes them too."""
    checks = gpu_checks.check_group(group, ["cpp", "reference"], "cpu", ((4, 257),))
    assert checks and not [check.text for check in checks if not check.passed]


SPOILS = {
    "loss": lambda loss, grad: (loss + 1e-3 * loss.abs().max(), grad),
    "one row of the gradient": lambda loss, grad: (
        loss,
        grad * (torch.arange(len(grad)) > 0)[:, None],
    ),
    "one column": lambda loss, grad: (loss, grad + 0.02 * grad[-1].norm() * torch.eye(*grad.shape)),
    "NaN": lambda loss, grad: (loss, grad * torch.nan),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_wrong_kernel_fails_its_check(monkeypatch, spoil):
    import kdkernels

    true = kdkernels.distillation_loss_and_grad

    def wrong(*args, **options):
        result = true(*args, **options)
        return SPOILS[spoil](*result) if options["backend"] == "cpp" else result

    monkeypatch.setattr(kdkernels, "distillation_loss_and_grad", wrong)
    group = gpu_checks.Group("forward_kl", "float32")
    failed = [c for c in gpu_checks.check_group(group, ["cpp"], "cpu", ((4, 257),)) if not c.passed]
    assert failed and all("one pass" in check.what or "alone" in check.what for check in failed)


def test_kernels_that_depend_on_their_neighbours_fail(monkeypatch):
    """Bits that change from call to call, as from atomics."""
    import kdkernels

    true, calls = kdkernels.distillation_loss_and_grad, []

    def wrong(*args, **options):
        loss, *rest = true(*args, **options)
        calls.append(1)
        return (torch.nextafter(loss, loss + len(calls) % 2), *rest)

    monkeypatch.setattr(kdkernels, "distillation_loss_and_grad", wrong)
    group = gpu_checks.Group("forward_kl", "float32")
    checks = gpu_checks.check_group(group, ["cpp"], "cpu", ((4, 257),))
    assert "loss, one pass, a second time" in [c.what for c in checks if not c.passed]


def test_a_backend_that_raises_fails_and_the_others_go_on():
    group = gpu_checks.Group("forward_kl", "float32")
    checks = gpu_checks.check_group(group, ["no such", "reference"], "cpu", ((4, 33),))
    (failed,) = [check for check in checks if not check.passed]
    assert failed.backend == "no such" and "ValueError" in failed.problem


def test_a_process_that_dies_is_a_failed_check():
    group = gpu_checks.Group("no such divergence", "float32")
    found = gpu_checks.run_all([group], ["cpp"], 60, "cpu", ((4, 33),))
    (check,) = found[group.name]
    assert not check.passed and "ended with status 1" in check.text


def test_ties_of_total_variation_are_allowed_for_and_nothing_else():
    student = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    near = torch.tensor([[1.0, 2.0, 3.0 + 1e-7, 0.0]])
    far = torch.tensor([[0.0, 3.0, 1.0, 1.0]])
    assert gpu_checks._ties(student, near, 2.0, 2.0).item() == pytest.approx(4.0, rel=1e-5)
    assert gpu_checks._ties(student, far, 2.0, 2.0).item() == 0


def test_predictions_are_made_of_the_stored_counts(monkeypatch):
    """A card at its full bandwidth, launches that cost nothing: bytes over bandwidth."""
    launch = roofline_model.Launch("k", True, requested=4e6, unique=4e6)
    works = {
        "ours|cpp|jsd|forward|200|90": roofline_model.Work((launch,)),
        "ours|cpp|jsd|backward|200|90": roofline_model.Work((launch.scaled(1.5),)),
        "ours|triton|jsd|one pass|200|90": roofline_model.Work((launch,)),
    }
    monkeypatch.setattr(gpu.roofline, "Counts", lambda: SimpleNamespace(works=works))
    monkeypatch.setattr(
        gpu.roofline, "stored_parameters", lambda _: roofline_model.Parameters((("H100", 1.0),))
    )
    monkeypatch.setattr(gpu.roofline, "error_bar", lambda _: 1.25)
    case = replace(CASE, contestants=("cpp, fresh", "cpp, one pass", "triton, in place", "eager"))
    found = gpu.predictions(case, GPU["name"])
    rows = case.rows / gpu.roofline.ROWS
    assert found.keys() == {"cpp, fresh", "triton, in place"}
    assert found["cpp, fresh"]["ms"] == pytest.approx(rows * 10e6 / 3.35e12 * 1e3)
    assert found["triton, in place"]["high"] == pytest.approx(1.25 * rows * 4e6 / 3.35e12 * 1e3)
    assert gpu.predictions(replace(case, dtype="float32"), GPU["name"]) == {}
    assert gpu.predictions(case, "NVIDIA T4") == {}


def test_times_that_hold_waits_for_the_host_are_marked():
    contestant = {"allocation": "fresh gradient", "ms": dict.fromkeys(("p20", "p50", "p80"), 3.0)}
    contestant |= {"host_ms": 2.5, "gb_per_s": 100.0}
    result = {"case": "c", "temperature": 2.0, "rounds": 7, "ratios": []}
    result["contestants"] = {"eager": contestant}
    run_ = {"busy_ms": 2.0, "copy_gb_per_s": 200.0}
    text = report.gpu_table(result, run_)
    assert "2.50!" in text and "waits for the host" in text and "50%" in text
    contestant["host_ms"] = 0.5
    assert "!" not in report.gpu_table(result, run_)


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--case", "hinge/*"])
    assert "nothing fits --case hinge/*" in capsys.readouterr().err


def test_list_names_checks_and_cases(capsys):
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "check jsd/float16" in lines and "jsd/bfloat16/2048x32000" in lines
