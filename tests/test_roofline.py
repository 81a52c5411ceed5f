"""The roofline model on numbers worked by hand, its calibration's rules, and its counts."""

import importlib
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import roofline
from benchmarks import roofline_counts as counting
from benchmarks.roofline_model import (
    CARDS,
    IDEAL,
    Launch,
    Parameters,
    Point,
    Work,
    error,
    fit,
    host_bound,
    limits,
    memory_bytes,
    predict,
    quantile,
)

H100 = CARDS["H100"]


def launch(**counts):
    return Launch(**{"name": "kernel", "kernel": True, "requested": 0, "unique": 0, **counts})


def point(seconds, work, name="a", card="H100"):
    return Point(name, "forward", card, "V=1", "2026-01-01", "0", seconds, work)


# One millisecond of each limit of an H100: 3.35 TB/s; 132 multiprocessors at 1.98 GHz with 16
# special functions, 128 FMAs and 128 instructions a clock.
ONE_MS = {
    "memory": launch(requested=3.35e9, unique=3.35e9),
    "MUFU": launch(mufu=132 * 1.98e6 * 16),
    "FMA": launch(fma=132 * 1.98e6 * 128),
    "issue": launch(instructions=132 * 1.98e6 * 128),
}


@pytest.mark.parametrize("name", ONE_MS)
def test_each_limit_alone(name):
    found = limits(ONE_MS[name], H100)
    assert found[name] == pytest.approx(1e-3)
    assert sum(found.values()) == pytest.approx(1e-3)
    prediction = predict(Work((ONE_MS[name],)), H100, IDEAL)
    assert (prediction.binding, prediction.fraction) == (name, pytest.approx(1.0))


def test_the_cards_reach_their_data_sheets():
    """FP32 TFLOPS of the data sheets: the one figure that ties SMs, clock and lanes together."""
    sheets = {"A100": 19.5, "H100": 67, "H100 PCIe": 51, "H200": 67, "B200": 75}
    for name, tflops in sheets.items():
        card = CARDS[name]
        assert 2 * card.sms * card.clock * card.fma_per_clock / 1e12 == pytest.approx(tflops, 0.01)


def test_the_binding_limit_and_what_is_not_hidden():
    # 3 ms of memory beside 2 ms of MUFU.
    both = launch(requested=3 * 3.35e9, unique=3 * 3.35e9, mufu=2 * ONE_MS["MUFU"].mufu, fma=1.0)
    found = predict(Work((both,)), H100, IDEAL)
    assert (found.binding, found.seconds) == ("memory", pytest.approx(3e-3))
    # Half the bandwidth makes 6 ms; a tenth of the MUFU's 2 ms shows; a launch and one wait.
    parameters = Parameters((("H100", 0.5),), 0.1, 7e-6, 50e-6)
    found = predict(Work((both,), synchronisations=1), H100, parameters)
    assert found.seconds == pytest.approx(6e-3 + 0.2e-3 + 7e-6 + 50e-6)
    assert found.fraction == pytest.approx(3e-3 / found.seconds)
    # A card without published timings takes the H100's fraction.
    assert predict(Work((both,)), CARDS["H200"], parameters).seconds == pytest.approx(
        3 * 3.35 / 4.8 / 0.5 * 1e-3 + 0.2e-3 + 7e-6
    )


def test_launches_follow_one_another():
    work = Work((ONE_MS["memory"], ONE_MS["MUFU"], ONE_MS["MUFU"]))
    found = predict(work, H100, IDEAL)
    assert (found.binding, found.seconds) == ("MUFU", pytest.approx(3e-3))
    assert predict(work.scaled(2), H100, IDEAL).seconds == pytest.approx(6e-3)


@pytest.mark.parametrize("times_l2, again", [(0.5, 0), (1, 0), (2, 0.5), (4, 0.75)])
def test_what_is_read_again_comes_from_l2_as_far_as_it_fits(times_l2, again):
    # 1024 threads a block: 2 blocks a multiprocessor, 264 alive. Each reads its own bytes twice.
    blocks = 10 * 264
    unique = blocks / 264 * times_l2 * H100.l2
    work = launch(requested=2 * unique, unique=unique, blocks=blocks, threads=1024)
    assert memory_bytes(work, H100) == pytest.approx(unique * (1 + again))


def test_registers_and_shared_memory_limit_the_blocks_alive():
    base = launch(requested=4 * H100.l2, unique=2 * H100.l2, blocks=264, threads=1024)
    assert memory_bytes(base, H100) == pytest.approx(3 * H100.l2)
    for limit in ({"registers": 64}, {"shared": 200 << 10}):  # one block a multiprocessor
        assert memory_bytes(replace(base, **limit), H100) == pytest.approx(2 * H100.l2)


def test_spilled_registers_are_traffic():
    assert memory_bytes(launch(requested=5, unique=5, spilled=7), H100) == 12
    assert Work((launch(spilled=1),)).spills and not Work((launch(),)).spills


def test_the_counts_survive_json():
    work = Work((launch(requested=3.0, unique=2.0, blocks=4.0, registers=40),), 2)
    assert Work.from_json(json.loads(json.dumps(work.to_json()))) == work


def test_the_hold_out_rule():
    """By name alone, about a third; the published time and the counts have no say."""
    points = [point(1.0, Work(()), name=str(n)) for n in range(999)]
    held = [p.held_back for p in points]
    assert 280 < sum(held) < 400
    others = [replace(p, seconds=2.0, work=Work((launch(),))) for p in points]
    assert [p.held_back for p in others] == held
    # sha256("0|forward|H100|V=1|2026-01-01") begins with 0x43 = 67 = 3·22 + 1.
    assert not held[0]


def test_the_error_is_a_factor_either_way():
    for seconds in (2e-3, 0.5e-3):
        assert error(point(seconds, Work((ONE_MS["memory"],))), IDEAL) == pytest.approx(2)


def test_the_fit_finds_what_made_the_times():
    true = Parameters((("H100", 0.8),), 0.25, 10e-6, 60e-6)
    points = []
    for n in range(1, 41):
        work = launch(requested=n * 2e8, unique=n * 2e8, mufu=ONE_MS["MUFU"].mufu * (n % 5) / 10)
        calls = Work((work,) * (1 + n % 3), n % 2)
        points.append(point(predict(calls, H100, true).seconds, calls, name=str(n)))
    found = fit(points)
    assert quantile((error(p, found) for p in points), 0.9) < 1.03
    assert dict(found.bandwidth)["H100"] == pytest.approx(0.8, abs=0.03)


def test_quantiles_are_values():
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile(range(1, 11), 0.9) == 9
    assert quantile([5.0], 0.9) == 5.0


# The stored results -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    return json.loads(roofline.CALIBRATION.read_text())


def test_the_stored_calibration_is_what_its_counts_give(calibration):
    """Every published timing is there; each prediction follows from the stored counts and
    parameters; nothing that is held back, spills or waits for the host was fitted.
    """
    if not roofline.PUBLISHED.exists():
        pytest.skip(f"the published timings are not at {roofline.PUBLISHED}")
    points = roofline.calibration_points(roofline.Counts())
    stored = {
        "|".join(p[name] for name in ("kernel", "mode", "card", "x", "date")): p
        for p in calibration["points"]
    }
    assert {p.key for p in points} == stored.keys() and len(points) == len(stored)
    parameters = roofline.stored_parameters(calibration)
    for p in points:
        line = stored[p.key]
        found = predict(p.work, CARDS[p.card], parameters).seconds * 1e3
        assert found == pytest.approx(line["predicted_ms"], rel=0.01, abs=1e-4)
        if line["group"] == "fitted":
            assert not (p.held_back or p.work.spills or host_bound(p))
        if p.work.spills:
            assert line["group"] == "spilling"


def test_the_error_bar_is_the_larger_ninetieth_percentile(calibration):
    found = [p["error"] for p in calibration["points"] if p["group"] == "held back"]
    assert quantile(found, 0.9) == pytest.approx(calibration["summary"]["held back"]["p90"], 0.01)
    assert roofline.error_bar(calibration) >= calibration["summary"]["held back"]["p90"]
    assert roofline.error_bar(calibration) >= calibration["summary"]["unseen kernel"]["p90"]


def test_the_table_says_that_it_is_a_prediction(calibration):
    line = roofline.Line("Triton", "jsd", "forward", 32000, {90: Work((ONE_MS["memory"],))})
    text = roofline.prediction_table([line], calibration)
    assert "(a prediction: nothing here was timed)" in text.splitlines()[0]
    assert f"factor of {roofline.error_bar(calibration):.2f}" in text
    assert "| Triton | jsd, forward | 32000 | 1 |" in text and "not counted" in text


def test_the_stored_table_is_what_its_counts_give(calibration):
    text = roofline.predictions_text(roofline.Counts(), calibration)
    assert roofline.PREDICTIONS.read_text() == text
    # linear_distillation_loss: both paths and divergences, a line each.
    assert sum(line.startswith(("| chunks |", "| low_memory |")) for line in text.split("\n")) == 4


# Counting -----------------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "ptxrun", None)
    with pytest.raises(counting.Missing, match="ptxrun"):
        counting.require()


@pytest.fixture
def can_count():
    try:
        counting.require()
    except counting.Missing as e:
        pytest.skip(str(e))


def test_pytorchs_operators_are_counted_by_their_tensors():
    x = torch.zeros(4, 8)
    launches: list[Launch] = []
    with counting._Operators(launches) as operators:
        x.add_(1)  # in place: read once, written once
        y = x.view(8, 4).t()  # free
        z = y * y  # one tensor read, one written
        torch.log_softmax(x, -1)  # three reads and a write
        bool(torch.equal(z, z))
    found = [(made.name, made.requested, made.unique) for made in launches]
    size = 4 * 8 * 4
    assert found[:3] == [
        ("add_", 2 * size, 2 * size),
        ("mul", 2 * size, 2 * size),
        ("_log_softmax", 4 * size, 2 * size),
    ]
    assert operators.waits == 1


def test_a_kernel_of_known_counts(can_count):
    """exp2 of two float32 rows read twice: 8 bytes asked for an element, 4 of them new, 4 written;
    one ex2 each; twice the rows, twice the counts.
    """
    import triton
    from roofline_kernel import exp2_twice  # Triton reads a kernel's source from its file

    def run(rows):
        x, y = torch.zeros(rows, 1024), torch.zeros(rows, 1024)
        return counting.count(lambda: exp2_twice[(rows,)](x, y, BLOCK=1024), 90)

    assert triton
    work = run(2)
    (made,) = work.launches
    assert (made.requested, made.unique, made.mufu) == (2 * 1024 * 12, 2 * 1024 * 8, 2 * 1024)
    assert (made.blocks, made.threads, made.spilled) == (2, 128, 0)
    assert 8 < made.registers < 128
    assert run(4) == work.scaled(2)


def test_a_fresh_count_of_a_peer_is_the_stored_one(can_count):
    version, job = "0.3.1", {
        "op": "kl_div", "mode": "forward", "upstream": "one",
        "rows": roofline.ROWS, "columns": 4096, "arch": 90,
    }  # fmt: skip
    if not (counting.liger_folder(version) / "liger_kernel").exists():
        pytest.skip(f"liger-kernel {version} is not at {counting.liger_folder(version)}")
    (fresh,) = counting.count_liger(version, [job])
    assert fresh == roofline.Counts().works[roofline.liger_key(version, job)]


def test_a_fresh_count_of_ours_is_the_stored_one(can_count):
    name, job = next((name, job) for name, job in roofline.our_jobs() if name == "softmax")
    # In a process of its own, as --count does: other tests have compiled and loaded in this one.
    (fresh,) = counting.count_ours_apart([job], "triton", 90)
    stored = roofline.Counts().works[roofline.our_key("triton", name, job, 90)]
    assert fresh == stored, "the kernels changed: python -m benchmarks.roofline --count"
    assert fresh.total("unique") == pytest.approx(roofline.ROWS * job["columns"] * 6, rel=0.01)
