"""The device kernels' machine code is no worse than in the committed table; the tool sees it."""

import shutil
from dataclasses import replace

import pytest

from benchmarks import device_code
from kdkernels.divergences import DIVERGENCES

try:
    device_code.compilers()
    MISSING = None
except (device_code.Unavailable, ImportError) as missing:
    MISSING = str(missing)

needs_compilers = pytest.mark.skipif(MISSING is not None, reason=f"cannot compile here: {MISSING}")

ROW = device_code.row(
    90,
    "cuda csrc/x.cu",
    "kernel<A>",
    64,
    "LDG.E.128 LDG.E.128 LDG.E LDGSTS.E.BYPASS.128 LD.E.64 LDG.E.U16 LDS.128 STG.E.128 ST.E.U8 "
    "STS MUFU.EX2 MUFU.EX2 MUFU.LG2 MUFU.RCP MUFU.RSQ FFMA".split(),
)


def test_opcodes_are_counted_by_what_they_move():
    assert (ROW.loads_16, ROW.loads_8, ROW.loads_4, ROW.loads_less) == (3, 1, 1, 1)
    assert (ROW.stores_16, ROW.stores_8, ROW.stores_4, ROW.stores_less) == (1, 0, 0, 1)
    assert (ROW.ex2, ROW.lg2, ROW.rcp, ROW.other_mufu, ROW.spills) == (2, 1, 1, 1, 0)
    spilling = device_code.row(90, "s", "k", 255, ["STL.64", "LDL", "LDL.LU", "LDC"])
    assert spilling.spills == 16 and spilling.stack == 3


def test_what_ptxas_says_of_spills():
    said = """ptxas info    : Function properties for _Zcalled
    32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Zkernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    assert device_code.SPILLS.findall(said) == [("_Zcalled", "4", "8"), ("_Zkernel", "0", "0")]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs binutils' c++filt")
@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        # void kd::f::(anonymous namespace)::pieces<(kd::f::Family)2>(kd::f::Call)
        ("_ZN2kd1f12_GLOBAL__N_16piecesILNS0_6FamilyE2EEEvNS0_4CallE", "f::pieces<(f::Family)2>"),
        ("_ZN2kd1f12_GLOBAL__N_15scaleENS0_4CallE", "f::scale"),
        ("_ZN2kd4rowsINS_3JSDEEEvPFviE", "rows<JSD>"),  # takes a void (*)(int)
        ("_write", "_write"),
    ],
)
def test_kernels_are_told_apart_by_their_template_arguments(mangled, name):
    assert device_code.short(mangled) == name


def test_every_kernel_has_a_row_of_its_own():
    lines = device_code.TABLE.read_text().splitlines()
    assert len(device_code.parse("\n".join(lines))) == sum(line[:2] == "| " for line in lines) - 1


def test_the_table_reads_back(monkeypatch):
    monkeypatch.setattr(device_code, "compilers", lambda: "nvcc 1, Triton 2")
    other = replace(ROW, arch=80, kernel="other")
    assert device_code.parse(device_code.table([ROW, other])) == {ROW.key: ROW, other.key: other}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 65}, ["registers 64 -> 65: 8 -> 7 warps fit a scheduler"]),
        ({"registers": 57}, []),
        ({"spills": 1}, ["spills 0 -> 1"]),
        ({"stack": 1}, ["stack 0 -> 1"]),
        ({"loads_16": 2, "loads_8": 3}, ["16-byte loads: 50% -> 29% of them"]),
        ({"stores_16": 0, "stores_4": 4}, ["16-byte stores: 50% -> 0% of them"]),
        ({"loads_16": 6, "loads_8": 2, "loads_4": 2, "loads_less": 2}, []),  # unrolled once more
        ({"ex2": 3}, ["ex2 2 -> 3"]),
        ({"rcp": 0, "lg2": 0, "other_mufu": 0, "loads_4": 0}, []),
    ],
)
def test_what_counts_as_worse(change, said):
    assert device_code.worse(ROW, replace(ROW, **change)) == said


def test_kernels_that_come_and_go_are_differences():
    known = {ROW.key: ROW}
    new = replace(ROW, kernel="kernel<B>")
    found = device_code.compare(known, [new], {ROW.source}, {90})
    assert found == [
        "sm_90 cuda csrc/x.cu kernel<B>: not in the table",
        "sm_90 cuda csrc/x.cu kernel<A>: in the table, but no more",
    ]
    assert device_code.compare(known, [], {"cuda csrc/y.cu"}, {90}) == []
    assert device_code.compare(known, [], {ROW.source}, {80}) == []


def test_every_source_and_divergence_is_in_the_table():
    rows = device_code.parse(device_code.TABLE.read_text()).values()
    for arch in device_code.ARCHITECTURES:
        assert {row.source for row in rows if row.arch == arch} == {*device_code.sources()}
    triton = {row.source.split()[1].split("/")[0] for row in rows if row.source[:7] == "triton "}
    assert triton == {*DIVERGENCES, "softmax", "log_softmax"}


@needs_compilers
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs binutils' c++filt")
def test_a_spilling_kernel_is_seen(tmp_path):
    """nvcc, cuobjdump and the counting together, on a kernel whose code is known."""
    source = tmp_path / "spills.cu"
    source.write_text("""
        namespace kd { namespace {
        template <int N>
        __global__ void __launch_bounds__(1024, 2) keeps(const float4* x, float4* y) {
          float4 kept[N];
          for (int i = 0; i < N; ++i) kept[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < N; ++i) {
            float4 v = kept[i], w = kept[N - 1 - i];
            y[i * 1024 + threadIdx.x] = make_float4(exp2f(v.x), w.y, v.z, w.w);
          }
        }
        template __global__ void keeps<2>(const float4*, float4*);
        template __global__ void keeps<16>(const float4*, float4*);
        } }
    """)
    rows = {}
    for name, binary, said in device_code.cuda_binary(str(source), 90):
        for row in device_code.read(binary, 90, name, said):
            rows[row.kernel] = row
    few, many = rows["keeps<2>"], rows["keeps<16>"]
    assert (
        few.spills == few.stack == 0 and few.loads_16 == 2 and few.stores_16 == 2 and few.ex2 == 2
    )
    assert many.spills > 0 and many.stack > 0 and many.registers <= 32


@needs_compilers
def test_softmax_is_no_worse_than_the_table(capsys):
    """One source and one call; CI compares the others too."""
    only = ("--only", "cuda csrc/softmax/*", "--only", "triton softmax/*")
    status = device_code.main(["--check", "--arch", "90", *only])
    said = capsys.readouterr()
    if "the table was not made by" in said.err:
        pytest.skip(said.err)
    assert status == 0, said.out
    assert "kernels compared with device_code.md, 0 differences" in said.out


@needs_compilers
def test_a_change_for_the_worse_ends_with_1(monkeypatch, tmp_path, capsys):
    rows = device_code.parse(device_code.TABLE.read_text())
    better = [replace(row, ex2=max(row.ex2 - 1, 0)) for row in rows.values()]
    table = tmp_path / "device_code.md"
    table.write_text(device_code.table(better))
    monkeypatch.setattr(device_code, "TABLE", table)
    assert device_code.main(["--check", "--arch", "90", "--only", "triton softmax/*"]) == 1
    assert "sm_90 triton softmax/bfloat16/32000 _write: ex2" in capsys.readouterr().out


def test_without_nvcc_it_is_refused_in_plain_words(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert device_code.main(["--check", "--arch", "90"]) == 2
    assert "cannot compile here: " in capsys.readouterr().err


def test_nothing_spills():
    rows = device_code.parse(device_code.TABLE.read_text()).values()
    assert rows and not [row.key for row in rows if row.spills]
