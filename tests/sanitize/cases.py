"""Calls of the row kernels where an index goes wrong first, on NumPy arrays and without torch.

`python tests/sanitize/cases.py MODULE` runs them all, with a second argument a planted bug instead;
run.py does so under each sanitizer. test_row_kernels.py compares what `distillation`, `softmax`,
`kl_div` and `feature_loss` return with the oracle.
"""

import importlib.util
import itertools
import sys
from typing import NamedTuple

import numpy as np

# NumPy has no bfloat16: its bits are kept as uint16.
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
}

# Every divergence. Parameters, like all numbers here, are exact in float32, so that one truth
# serves every dtype. The second tuple is per row, with the ends at which a family becomes a KL.
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {"weight": (0.25, 0.5, 0.0, 0.5, 1.0)},
    "jsd": {"beta": (0.25, 0.5, 0.0, 0.5, 1.0), "normalized": True},
    "skew_forward_kl": {"lam": (0.125, 0.5, 0.0, 0.5, 1.0)},
    "skew_reverse_kl": {"lam": (0.125, 0.5, 0.0, 0.5, 1.0)},
    "alpha": {"alpha": (0.75, 0.5, 0.0, 0.5, 1.0)},
    "tvd": {},
    "renyi": {"order": (0.5, 0.5, 1.0, 0.5, 2.0)},
    "ab": {"alpha": (0.25, 0.5, 1.0, 0.5, 0.5), "beta": 0.75},
    "dkd": {"target_weight": (1.0, 0.5, 0.0, 0.5, 2.0), "non_target_weight": 8.0},
}

# Which terms a call has, each a way of its own through the kernels.
TERMS = {
    "kd": {},
    # The softmax at temperature 1 is then the student's own, and ignored rows keep their KD.
    "kd and ce at temperature 1": {"ce_weight": 0.5, "mask_kd": False},
    "all": {
        "temperature": 2.0,
        "teacher_temperature": 1.5,
        "ce_weight": 0.5,
        "z_loss_weight": 0.0078125,
        "label_smoothing": 0.125,
        "return_stats": True,
    },
    "ce alone": {"kd_weight": 0.0, "ce_weight": 1.0, "t_squared": False},
}
WEIGHTS = np.array([1.0, 1.0, 0.5, 0.0, 2.0])
UPSTREAM = np.array([1.0, 0.5, 2.0, 4.0, 0.25])


class Case(NamedTuple):
    divergence: str = "forward_kl"
    vocab: int = 17
    dtypes: tuple[str, str] = ("float32", "float32")
    terms: str = "all"
    rows: int = 5
    padding: int = 0  # columns behind vocab_size; the teacher has one more
    gap: int = 0  # elements between the rows that are nobody's
    offset: int = 0  # elements before the first row: it does not start at an aligned address


def vocabs(block):
    """One column, an odd two, around the 16 floats of the widest vector, around a block,
    three blocks.
    """
    return 1, 2, 15, 16, 17, block - 1, block, block + 1, 2 * block + 3


def distillation_cases(block, vocab_sizes=None):
    """Every divergence at every size in both types that the kernels compute in,
    and in every dtype.
    """
    terms = itertools.cycle(TERMS)
    for name in DIVERGENCES:
        for vocab in vocab_sizes or vocabs(block):
            yield Case(name, vocab, terms="all")
            yield Case(name, vocab, ("float64", "float64"), next(terms), gap=1)
            yield Case(name, vocab, terms=next(terms), padding=3, offset=1)
        for student, teacher in itertools.product(DTYPES, DTYPES):
            yield Case(name, 17, (student, teacher), next(terms), padding=2, gap=3, offset=1)
        for kind in TERMS:
            yield Case(name, 33, terms=kind)
        yield Case(name, rows=0)
    # What is loaded and stored, block by block, in every dtype.
    for vocab, dtype in itertools.product(vocab_sizes or vocabs(block), DTYPES):
        yield Case("forward_kl", vocab, (dtype, dtype), "kd", gap=1)
        yield Case("jsd", vocab, (dtype, dtype), "all", padding=1, offset=3)


# Arrays -------------------------------------------------------------------------------------------


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(values, dtype):
    """`values` in one of DTYPES, to the nearest, ties to even."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return values.astype(DTYPES[dtype])
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def read(array):
    """As float64."""
    return (from_bfloat16(array) if array.dtype == np.uint16 else array).astype(np.float64)


class Exact:
    """A matrix that ends with its allocation: AddressSanitizer sees one element past the last row.

    Between the rows, and before the first, lies a mark that nobody may overwrite.
    """

    def __init__(self, values, dtype, gap, offset):
        n, columns = values.shape
        stride = columns + gap
        self.memory = np.full(offset + (n and (n - 1) * stride + columns), self.mark(dtype))
        self.outside = np.ones(self.memory.shape, bool)
        self.array = self._rows(self.memory, offset, stride, values.shape)
        self.array[...] = stored(values, dtype)
        self._rows(self.outside, offset, stride, values.shape)[...] = False
        self.before = self.memory.copy()

    @staticmethod
    def mark(dtype):
        return DTYPES[dtype](77)

    @staticmethod
    def _rows(memory, offset, stride, shape):
        size = memory.itemsize
        return np.lib.stride_tricks.as_strided(memory[offset:], shape, (stride * size, size))

    def check(self, written):
        here = self.outside if written else slice(None)
        assert self.memory[here].tobytes() == self.before[here].tobytes(), "wrote out of its rows"


def exact(values, dtype, case):
    return Exact(values, dtype, case.gap, case.offset)


def logits(rows, columns, seed):
    return np.random.default_rng(seed).normal(size=(rows, columns)) * 3


# distillation_loss --------------------------------------------------------------------------------


class Inputs(NamedTuple):
    student: np.ndarray  # (rows, vocab + padding) values that its dtype can hold
    teacher: np.ndarray
    labels: np.ndarray
    token_weights: np.ndarray
    parameters: dict  # of the divergence: numbers, or one a row
    options: dict
    masked: np.ndarray  # (rows,): of every term
    real: type


def inputs_of(case):
    n, options = case.rows, dict(TERMS[case.terms])
    if case.divergence == "dkd":
        options["mask_kd"] = True
    labels = np.array([case.vocab - 1, -100, 0, case.vocab // 2, case.vocab - 1])[:n]
    masked = (WEIGHTS[:n] == 0) | ((labels == -100) & options.get("mask_kd", True))
    if case.terms == "ce alone":
        masked |= labels == -100
    matrices = []
    for seed, dtype in enumerate(case.dtypes):
        x = logits(n, case.vocab + (case.padding and case.padding + seed), seed)
        x[:, case.vocab :] = np.nan  # what lies there must not matter, nor a masked row
        x[masked] = np.nan
        matrices.append(read(stored(x, dtype)))
    real = np.float64 if "float64" in case.dtypes else np.float32
    rows = case.terms == "all"
    parameters = {
        key: (np.array(value[:n], real) if rows else value[0])
        if isinstance(value, tuple)
        else value
        for key, value in DIVERGENCES[case.divergence].items()
    }
    return Inputs(*matrices, labels, WEIGHTS[:n].astype(real), parameters, options, masked, real)


def same(case, pairs, what):
    """Bitwise, but for NaN."""
    for one, other in pairs:
        np.testing.assert_array_equal(one, other, err_msg=f"{what}: {case}")


def distillation(module, level, threads, case):
    """Every way to the loss and the gradients: {name: array},
    gradients also by the backward's name.
    """
    kernels, inputs = module.distillation_loss, inputs_of(case)
    first, second, *_ = *inputs.parameters.values(), 0.0, 0.0
    shared = dict(
        labels=inputs.labels,
        divergence=case.divergence,
        label_smoothing=inputs.options.get("label_smoothing", 0.0),
        vocab_size=case.vocab,
    )
    given = shared | inputs.options
    given |= dict(first=first, second=second, token_weights=inputs.token_weights)
    if case.terms == "all":
        given["temperature"] = np.full(case.rows, given["temperature"], inputs.real)
        given["kd_weight"] = np.ones(1, inputs.real)
    student, teacher = (
        exact(values, dtype, case)
        for values, dtype in zip((inputs.student, inputs.teacher), case.dtypes, strict=True)
    )

    def gradients():
        return (
            exact(np.full_like(values, np.nan), dtype, case)
            for values, dtype in zip((inputs.student, inputs.teacher), case.dtypes, strict=True)
        )

    def forward(student, **gradients):
        return kernels.forward(
            level, threads, student, teacher.array, reduction="none", **given, **gradients
        )

    totals, rows, masks = forward(student.array)
    kd = ~inputs.masked if case.terms != "ce alone" else (inputs.labels != -100)
    kd &= inputs.token_weights != 0
    ce = (inputs.labels != -100) & (inputs.token_weights != 0)
    np.testing.assert_array_equal(masks, kd + 2 * ce)
    result = dict(totals=totals, rows=rows)

    upstream = UPSTREAM[: case.rows].astype(inputs.real)
    both = list(gradients())
    arrays = [x.array for x in both]
    kernels.backward(
        level, threads, upstream, student.array, teacher.array, rows,
        student_grad=arrays[0], teacher_grad=arrays[1], **shared,
    )  # fmt: skip
    result |= dict(backward_student=arrays[0], backward_teacher=arrays[1])

    alone, _ = gradients()
    alone_lines = forward(student.array, student_grad=alone.array)
    result |= dict(one_pass_totals=alone_lines[0], one_pass_rows=alone_lines[1])
    result["one_pass_student"] = alone.array

    together = list(gradients())
    together_lines = forward(
        student.array, student_grad=together[0].array, teacher_grad=together[1].array
    )
    result |= dict(student=together[0].array, teacher=together[1].array)

    inplace = [exact(inputs.student, case.dtypes[0], case) for _ in range(2)]
    again = list(gradients())[1]
    lines = forward(inplace[0].array, student_grad=inplace[0].array)
    same(case, zip(lines, alone_lines, strict=True), "lines in place")
    same(case, [(inplace[0].array, alone.array)], "student's gradient in place")
    lines = forward(inplace[1].array, student_grad=inplace[1].array, teacher_grad=again.array)
    same(
        case, zip(lines, together_lines, strict=True), "lines in place, with the teacher's gradient"
    )
    same(case, [(inplace[1].array, together[0].array)], "student's gradient in place of two")
    same(case, [(again.array, together[1].array)], "teacher's gradient beside one in place")

    scaled = exact(inputs.student, case.dtypes[0], case)
    kernels.scale_rows(level, threads, scaled.array, upstream)
    result["scaled"] = scaled.array

    for matrix in (student, teacher):
        matrix.check(written=False)
    for matrix in (*both, alone, *together, *inplace, again, scaled):
        matrix.check(written=True)
    for matrix in (*both, alone, *together):
        assert not matrix.array[inputs.masked].any(), "the gradient of a masked row is not 0"
        assert not matrix.array[:, case.vocab :].any(), "the gradient of padding is not 0"
    return result


# softmax, kl_div ----------------------------------------------------------------------------------


class SoftmaxCase(NamedTuple):
    vocab: int
    dtype: str = "float32"
    log: bool = False
    rows: int = 5
    gap: int = 0
    offset: int = 0


def softmax_cases(block, vocab_sizes=None):
    for vocab, dtype, log in itertools.product(vocab_sizes or vocabs(block), DTYPES, (False, True)):
        yield SoftmaxCase(vocab, dtype, log, gap=1, offset=vocab % 2)
    yield SoftmaxCase(17, rows=0)


def softmax(module, level, threads, case):
    real = np.float64 if case.dtype == "float64" else np.float32
    temperature = np.array([1.0, 2.0, 0.5, 1.5, 4.0], real)[: case.rows]
    x, upstream = (exact(logits(case.rows, case.vocab, seed), case.dtype, case) for seed in (0, 1))
    empty = np.full((case.rows, case.vocab), np.nan)
    output, gradient = (exact(empty, case.dtype, case) for _ in range(2))
    common = dict(temperature=temperature, log=case.log)
    module.softmax.forward(level, threads, x.array, output.array, **common)
    module.softmax.backward(level, threads, upstream.array, output.array, gradient.array, **common)
    for matrix in (x, upstream):
        matrix.check(written=False)
    for matrix in (output, gradient):
        matrix.check(written=True)
    return dict(x=x.array, upstream=upstream.array, output=output.array, gradient=gradient.array)


class KlDivCase(NamedTuple):
    shape: tuple[int, ...]
    layout: str = "contiguous"  # of both inputs: or "transposed", "broadcast", "every second"
    dtypes: tuple[str, str] = ("float32", "float32")
    log_target: bool = False


def kl_div_cases(block, task):
    """Sizes around a block and a task, each layout that is gathered first, every dtype."""
    for n, log_target in itertools.product((1, 17, block + 1, task, task + 1), (False, True)):
        yield KlDivCase((n,), log_target=log_target)
        yield KlDivCase((n,), dtypes=("float64", "float64"), log_target=log_target)
    for layout in ("transposed", "broadcast", "every second"):
        for shape in ((3, 17), (1, 1), (5, block + 1)):
            for student, teacher in itertools.product(DTYPES, DTYPES):
                yield KlDivCase(shape, layout, (student, teacher), log_target=layout == "broadcast")


def laid_out(values, dtype, layout):
    """Read-only where broadcast; its last element is the last of its allocation."""
    if layout == "transposed":
        return stored(values.T.copy(), dtype).T
    if layout == "broadcast":
        return np.broadcast_to(stored(values[:, :1].copy(), dtype), values.shape)
    if layout == "every second":
        flat = stored(values.ravel(), dtype)
        memory = np.full(2 * flat.size - 1, DTYPES[dtype](77))
        memory[::2] = flat
        rows, columns = values.shape
        size = memory.itemsize
        strides = (2 * columns * size, 2 * size)
        return np.lib.stride_tricks.as_strided(memory, (rows, columns), strides)
    return stored(values, dtype)


def kl_div(module, level, threads, case):
    generator = np.random.default_rng(0)
    log_x, log_t = (-generator.exponential(size=case.shape) * 3 for _ in range(2))
    x = laid_out(log_x, case.dtypes[0], case.layout)
    t = laid_out(log_t if case.log_target else np.exp(log_t), case.dtypes[1], "contiguous")
    double = "float64" in case.dtypes
    same = case.dtypes[0] == case.dtypes[1]
    terms = np.empty(
        case.shape, DTYPES[case.dtypes[0]] if same else np.float64 if double else np.float32
    )
    sums = module.kl_div.forward(level, threads, x, t, case.log_target)
    module.kl_div.forward(level, threads, x, t, case.log_target, terms)
    upstream = laid_out(log_x, "float64" if double else "float32", case.layout)
    input_grad, target_grad = np.empty_like(t, DTYPES[case.dtypes[0]]), np.empty_like(t)
    module.kl_div.backward(level, threads, upstream, x, t, case.log_target, input_grad, target_grad)
    result = dict(x=x, t=t, upstream=upstream, sums=sums, terms=terms)
    return result | dict(input_grad=input_grad, target_grad=target_grad)


# feature_loss -------------------------------------------------------------------------------------


class FeatureCase(NamedTuple):
    metric: str
    normalize: bool
    shape: tuple[int, int, int, int]  # samples, outer, inner, channels
    orders: tuple[str, str] = ("channels", "channels")  # of memory, innermost: student, teacher
    dtypes: tuple[str, str] = ("float32", "float32")
    masked: bool = False


FEATURE_METRICS = (
    ("l2", False),
    ("l2", True),
    ("smooth_l1", False),
    ("smooth_l1", True),
    ("cosine", False),
    ("attention", False),
    ("gaussian_nll", False),
)


def feature_cases(block):
    """Each metric along channels and along positions, in every dtype, where a line is a vector and
    one more, where a position is two blocks, where a line is several pieces; and no positions.
    """
    shapes = ((2, 1, 17, 3), (2, 2, 3, 33), (1, 1, 2, block + 1), (2, 1, 8300, 2), (1, 1, 700, 20))
    for metric, normalize in FEATURE_METRICS:
        for shape, masked in itertools.product(shapes, (False, True)):
            for order in ("channels", "positions"):
                yield FeatureCase(metric, normalize, shape, (order, order), masked=masked)
        for student, teacher in itertools.product(DTYPES, DTYPES):
            for orders in (("channels", "positions"), ("positions", "channels")):
                dtypes = student, teacher
                yield FeatureCase(metric, normalize, (2, 2, 17, 5), orders, dtypes, True)
        yield FeatureCase(metric, normalize, (2, 1, 0, 3))


def feature_in_memory(values, dtype, order):
    """Between its elements, in the innermost dimension, nothing; its end is its allocation's."""
    if order == "channels":
        return stored(values, dtype)
    return stored(np.moveaxis(values, 3, 1).copy(), dtype).transpose(0, 2, 3, 1)


def feature_loss(module, level, threads, case):
    generator = np.random.default_rng(0)
    real = np.float64 if "float64" in case.dtypes else np.float32
    student, teacher = (generator.normal(size=case.shape) for _ in range(2))
    mask = None
    if case.masked:
        mask = generator.choice([0.0, 1.0, 0.5], size=case.shape[:3]).astype(real)
        student[mask == 0] = teacher[mask == 0] = np.nan  # what lies there must not matter
    log_variance = generator.normal(size=case.shape[3]).astype(real)
    gaussian = case.metric == "gaussian_nll"
    s = feature_in_memory(student, case.dtypes[0], case.orders[0])
    t = feature_in_memory(teacher, case.dtypes[1], case.orders[1])
    gradient = feature_in_memory(np.full(case.shape, np.nan), case.dtypes[0], case.orders[0])
    losses, variance_sums = np.zeros(case.shape[0]), np.zeros(case.shape[3])
    module.feature_loss.run(
        level,
        threads,
        case.metric,
        case.normalize,
        0.75,
        s,
        t,
        gradient,
        mask,
        log_variance if gaussian else None,
        np.exp(-log_variance) if gaussian else None,
        losses,
        variance_sums,
    )
    result = dict(student=s, teacher=t, gradient=gradient, losses=losses)
    result |= dict(variance_sums=variance_sums, log_variance=log_variance)
    return result | dict(mask=np.ones(case.shape[:3]) if mask is None else mask)


# All of them --------------------------------------------------------------------------------------


def same_on_threads(run, module, level, case, threads):
    """The result on one thread, which must be bitwise that on several."""
    one, several = run(module, level, 1, case), run(module, level, threads, case)
    for name in one:
        np.testing.assert_array_equal(one[name], several[name], err_msg=f"{name} of {case}")
    return one


def find_bad_label(module):
    find = module.distillation_loss.find_bad_label
    labels = np.array([-100, 0, 16, 17, -1])
    assert [find(labels, -100, 17), find(labels, -100, 18), find(labels[:3], -100, 17)] == [
        3,
        4,
        -1,
    ]
    assert find(labels[:0], -100, 17) == -1


def main(path):
    module = load(path)
    find_bad_label(module)
    count = 0
    for level in module.levels:
        # The code around the loops is the same at each level: the best one gets every case.
        sizes = None if level == module.levels[-1] else (1, 17, module.block + 1)
        for run, cases in (
            (distillation, distillation_cases(module.block, sizes)),
            (softmax, softmax_cases(module.block, sizes)),
            (kl_div, kl_div_cases(module.block, module.kl_div.task)),
            (feature_loss, feature_cases(module.block)),
        ):
            for case in cases:
                same_on_threads(run, module, level, case, threads=3)
                count += 1
    print(f"{count} cases at {', '.join(module.levels)}")


def load(path):
    spec = importlib.util.spec_from_file_location("row_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        # A NumPy array, so that finding what lies behind it shows that the cases' arrays
        # are exact too.
        load(sys.argv[1]).distillation_loss.planted(sys.argv[2], np.ones((1, 8), np.float32))
