// similarity_loss on the CPU behind PyTorch's stable ABI: a block of rows at a time.
//
//   1. on threads by rows, 32 at a time: products of these rows and all keys, student's and
//      teacher's; row by row, while it is in the cache, its scores, distillation_loss's row kernel,
//      which writes ∂L/∂φ over the student's scores, and the chain rule; the rows' gradient, V·B
//   2. on threads by keys: the keys' gradient, += Vᵀ·A
//
// V of a block is the only memory of the size of rows × keys. Each sum has an order that depends on
// sizes alone, never on threads.
#include <vector>

#include "../cpu_level.h"
#include "../distillation_loss/ops.h"
#include "../scratch.h"
#include "problem.h"

namespace kd::similarity {

extern const Kernels<float> float_baseline, float_avx2, float_avx512;
extern const Kernels<double> double_baseline, double_avx2, double_avx512;

template <>
const Kernels<float>& kernels<float>() {
  return KD_AT_CPU_LEVEL(float);
}
template <>
const Kernels<double>& kernels<double>() {
  return KD_AT_CPU_LEVEL(double);
}

namespace {

int64_t ceil_to(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Rows that a thread takes at a time: their scores of 4096 keys, student's and teacher's, are 1 MiB
// and stay in its second-level cache.
constexpr int64_t kRows = 32;

// Rows of a block: 8 MiB of V, or 64 rows. Each block is two parallel regions, and on a busy
// machine a region waits for its last thread: in three regions for each 64 rows, N = M = 4096 took
// 3.5 s where eager torch took 3.9, and 0.21 on one thread.
int64_t block_rows(int64_t n, int64_t m) {
  int64_t rows = (int64_t(1) << 21) / m / kRows * kRows;
  rows = rows < 2 * kRows ? 2 * kRows : rows;
  return rows < ceil_to(n, kRows) ? rows : ceil_to(n, kRows);
}

// Keys that one step of a thread takes: a multiple of every level's rows and lanes.
constexpr int64_t kKeys = 64;

struct Wanted {
  bool student, keys, parameters, teacher_parameters;
  bool any() const { return student || keys || parameters || teacher_parameters; }
};

struct Arguments {
  Tensor student, student_keys, teacher, teacher_keys;
  OptionalTensor row_weights, key_mask, parameters;
  double gamma, temperature, teacher_gamma, teacher_temperature;
  std::string kernel, divergence;
  double first;
  OptionalTensor first_tensor;
  double second;
  OptionalTensor second_tensor;
  bool exclude_diagonal;
  std::string reduction;
};

Kernel kernel_named(const std::string& name) {
  int which = 0;
  for (const char* known : kernel_names) {
    if (name == known) return static_cast<Kernel>(which);
    ++which;
  }
  STD_TORCH_CHECK(false, "kdkernels: kernel '", name, "' is unknown to the C++ library");
}

template <class Real>
class Loss {
 public:
  Loss(const Arguments& arguments, Wanted wanted)
      : a_(arguments),
        wanted_(wanted),
        table_(kernels<Real>()),
        n_(arguments.student.size(0)),
        m_(arguments.student_keys.size(0)),
        width_(arguments.student.size(1)),
        padded_width_(ceil_to(width_, table_.lanes)) {
    for (const Tensor* x : {&a_.student, &a_.student_keys, &a_.teacher, &a_.teacher_keys}) {
      STD_TORCH_CHECK(x->dim() == 2 && x->is_contiguous() && x->scalar_type() == real_type<Real>,
                      "kdkernels: features must be contiguous matrices of one dtype");
    }
    STD_TORCH_CHECK(a_.teacher.size(0) == n_ && a_.teacher_keys.size(0) == m_ &&
                        a_.student_keys.size(1) == width_ &&
                        a_.teacher_keys.size(1) == a_.teacher.size(1),
                    "kdkernels: student and teacher must have the same rows and keys");
    STD_TORCH_CHECK(!a_.exclude_diagonal || n_ == m_,
                    "kdkernels: exclude_diagonal needs as many keys as rows");
    if (a_.row_weights) {
      STD_TORCH_CHECK(a_.row_weights->numel() == n_, "kdkernels: row_weights: one value a row");
      weights_ = reals<Real>(*a_.row_weights, "row_weights", n_);
    }
    if (a_.key_mask) {
      STD_TORCH_CHECK(a_.key_mask->scalar_type() == ScalarType::Bool &&
                          a_.key_mask->numel() == m_ && a_.key_mask->is_contiguous(),
                      "kdkernels: key_mask must be bool, contiguous, one a key");
      key_mask_ = static_cast<const bool*>(a_.key_mask->data_ptr());
    }
    Kernel kernel = kernel_named(a_.kernel);
    student_ = {kernel, Real(a_.gamma), Real(a_.temperature), nullptr};
    teacher_ = {kernel, Real(a_.teacher_gamma), Real(a_.teacher_temperature), nullptr};
    if (a_.parameters) {
      STD_TORCH_CHECK(a_.parameters->numel() == 4, "kdkernels: parameters must be four");
      const Real* given = reals<Real>(*a_.parameters, "parameters", 4);
      student_.gamma = given[0];
      student_.temperature = given[1];
      teacher_.gamma = given[2];
      teacher_.temperature = given[3];
    }
    for (Scores<Real>* s : {&student_, &teacher_}) {
      if (!(s->gamma > 0 && s->temperature > 0)) s->gamma = not_a_number<Real>();
    }
    divergence_ = divergence_named(a_.divergence);
    STD_TORCH_CHECK(divergence_ != Divergence::dkd, "kdkernels: dkd needs labels");
    reduction_ = reduction_named(a_.reduction);
    bool none = reduction_ == Reduction::none;
    loss = fresh(none ? std::vector<int64_t>{n_} : std::vector<int64_t>{});
    student_grad = fresh(wanted.student ? std::vector<int64_t>{n_, width_} : empty());
    keys_grad = fresh(wanted.keys ? std::vector<int64_t>{m_, width_} : empty());
    bool parameters = wanted.parameters || wanted.teacher_parameters;
    parameter_grads = fresh(parameters ? std::vector<int64_t>{4} : empty());
  }

  void run() {
    totals_.assign(n_, 0);
    parameter_sums_.assign(4 * n_, 0);
    if (n_ > 0) {
      prepare_keys();
      int64_t step = block_rows(n_, m_);
      allocate(step);
      for (int64_t begin = 0; begin < n_; begin += step) {
        block(begin, begin + step < n_ ? step : n_ - begin);
      }
    }
    if (wanted_.keys) finish_keys();
    reduce();
  }

  Tensor loss, student_grad, keys_grad, parameter_grads;

 private:
  static std::vector<int64_t> empty() { return {0}; }
  Tensor fresh(std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(a_.student, sizes);
  }
  static Real* data(const Tensor& x) { return static_cast<Real*>(x.data_ptr()); }
  Real* workspace(int64_t size) {
    keeping_.push_back(fresh({size}));
    return data(keeping_.back());
  }

  // A step of a thread that is worth handing out: at least some 10 µs of multiplications.
  static int64_t grain_of(int64_t multiplications) {
    return (int64_t(1) << 19) / (multiplications + 1) + 1;
  }

  // Keys as panels, their squares, and rows of whole vectors.
  void prepare_keys() {
    panels_ = ceil_to(m_, table_.panel) / table_.panel;
    padded_keys_ = ceil_to(panels_ * table_.panel, kKeys);
    // An odd number of cache lines apart: at multiples of 4 KiB rows would share a few cache sets.
    int64_t line = 64 / sizeof(Real);
    stride_ = ceil_to(padded_keys_, 2 * line) + line;
    auto pack = [&](const Tensor& keys, Scores<Real>& s) {
      int64_t columns = keys.size(1);
      Real* panels = workspace(panels_ * table_.panel * columns);
      Real* squares = is_distance(s.kernel) ? workspace(padded_keys_) : nullptr;
      torch::stable::parallel_for(
          0, panels_, grain_of(4 * columns * table_.panel), [&](int64_t from, int64_t to) {
            table_.pack(data(keys), m_, columns, from, to, panels);
            for (int64_t j = from * table_.panel; squares && j < to * table_.panel; ++j) {
              squares[j] = j < m_ ? table_.square(data(keys) + j * columns, columns) : Real(0);
            }
          });
      s.squares = squares;
      return panels;
    };
    student_panels_ = pack(a_.student_keys, student_);
    teacher_panels_ = pack(a_.teacher_keys, teacher_);
    keys_ = data(a_.student_keys);
    if (wanted_.student && padded_width_ != width_) {
      Real* rows = workspace(m_ * padded_width_);
      copy_rows(keys_, width_, m_, width_, rows, padded_width_);
      keys_ = rows;
    }
  }

  static void copy_rows(const Real* from, int64_t columns, int64_t n, int64_t width, Real* to,
                        int64_t stride) {
    for (int64_t i = 0; i < n; ++i) {
      memcpy(to + i * stride, from + i * columns, width * sizeof(Real));
      for (int64_t d = width; d < stride; ++d) to[i * stride + d] = 0;
    }
  }

  void allocate(int64_t rows) {
    rows_ = workspace(rows * padded_width_);
    teacher_rows_ = workspace(rows * a_.teacher.size(1));
    v_ = workspace(rows * stride_);
    lines_ = workspace(kLines * rows);
    row_sums_ = workspace(rows);
    masks_.resize(rows);
    if (wanted_.student) by_rows_ = workspace(rows * padded_width_);
    if (wanted_.keys) {
      by_keys_ = workspace(padded_keys_ * padded_width_);
      key_sums_ = workspace(padded_keys_);
      for (int64_t j = 0; j < padded_keys_; ++j) key_sums_[j] = 0;
    }
  }

  void block(int64_t begin, int64_t count) {
    Problem<Real> problem = problem_of_block(begin, count);
    prepare(problem);
    int64_t multiplications = kRows * m_ * (2 * width_ + a_.teacher.size(1)) / 8;
    torch::stable::parallel_for(0, ceil_to(count, kRows) / kRows, grain_of(multiplications),
                                [&](int64_t from, int64_t to) {
                                  for (int64_t k = from; k < to; ++k) {
                                    rows_of_block(problem, begin, count, k * kRows);
                                  }
                                });
    if (!wanted_.keys) return;
    torch::stable::parallel_for(
        0, padded_keys_ / kKeys, grain_of(kKeys * count * padded_width_ / 8),
        [&](int64_t from, int64_t to) {
          for (int64_t j = from * kKeys; j < to * kKeys; j += kKeys) {
            table_.product(v_ + j, 1, stride_, rows_, padded_width_, by_keys_ + j * padded_width_,
                           padded_width_, kKeys, padded_width_, count, begin > 0);
            if (is_distance(student_.kernel)) {
              table_.add_rows(v_ + j, stride_, count, key_sums_ + j, kKeys);
            }
          }
        });
  }

  Problem<Real> problem_of_block(int64_t begin, int64_t count) {
    Problem<Real> p;
    Dtype dtype = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32;
    p.n = count;
    p.vocab = m_;
    p.student = {reinterpret_cast<char*>(v_), dtype, stride_, m_};
    p.teacher = {nullptr, dtype, stride_, m_};  // a thread's own
    // In place. The columns behind the last key up to whole vectors become 0.
    Matrix whole{nullptr, dtype, stride_, ceil_to(m_, kWhole)};
    p.student_grad = p.teacher_grad = whole;
    if (wanted_.any()) p.student_grad.data = p.student.data;
    p.divergence = divergence_;
    p.rows = lines_;
    if (weights_ != nullptr) p.token_weights = weights_ + begin;
    p.first = parameter<Real>(a_.first, a_.first_tensor, "first", 1);
    p.second = parameter<Real>(a_.second, a_.second_tensor, "second", 1);
    p.temperature.value = p.teacher_temperature.value = 1;
    p.kd_weight.value = 1;
    p.t_squared = false;
    p.has_normalizer = true;
    p.normalizer.value = normalizer();
    p.reduction = reduction_;
    p.masks = masks_.data();
    p.totals = totals_.data() + begin;
    return p;
  }

  double normalizer() const {
    if (weights_ == nullptr) return static_cast<double>(n_);
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i) sum += weights_[i];
    return sum;
  }

  // What a thread works in: the teacher's scores of its rows, and products that scores replaced.
  struct Buffers {
    Real *teacher, *products, *teacher_products;
  };

  Buffers buffers() const {
    thread_local Scratch<Real> scratch;
    Real* memory = scratch.get((kRows + 2) * stride_);
    return {memory, memory + kRows * stride_, memory + (kRows + 1) * stride_};
  }

  // Rows `from` to `from` + kRows of a block, as far as there are so many.
  void rows_of_block(const Problem<Real>& problem, int64_t begin, int64_t count, int64_t from) {
    Buffers own = buffers();
    int64_t n = count - from < kRows ? count - from : kRows, rows = ceil_to(n, table_.rows);
    int64_t teacher_width = a_.teacher.size(1), panel = table_.panel;
    Real *a = rows_ + from * padded_width_, *ta = teacher_rows_ + from * teacher_width;
    Real* v = v_ + from * stride_;
    copy_rows(data(a_.student) + (begin + from) * width_, width_, n, width_, a, padded_width_);
    copy_rows(data(a_.teacher) + (begin + from) * teacher_width, teacher_width, n, teacher_width,
              ta, teacher_width);
    for (int64_t i = n * padded_width_; i < rows * padded_width_; ++i) a[i] = 0;
    for (int64_t i = n * teacher_width; i < rows * teacher_width; ++i) ta[i] = 0;
    for (int64_t p = 0; p < panels_; ++p) {
      table_.product(a, padded_width_, 1, student_panels_ + p * panel * width_, panel,
                     v + p * panel, stride_, rows, panel, width_, false);
      table_.product(ta, teacher_width, 1, teacher_panels_ + p * panel * teacher_width, panel,
                     own.teacher + p * panel, stride_, rows, panel, teacher_width, false);
    }
    // The row kernel finds row r of the block's teacher here.
    Problem<Real> here = problem;
    here.teacher.data = reinterpret_cast<char*>(own.teacher - from * stride_);
    if (wanted_.teacher_parameters) here.teacher_grad.data = here.teacher.data;
    for (int64_t r = 0; r < n; ++r) row(here, begin, from + r, v + r * stride_, own, r);
    if (!wanted_.student) return;
    Real* by_rows = by_rows_ + from * padded_width_;
    table_.product(v, stride_, 1, keys_, padded_width_, by_rows, padded_width_, rows, padded_width_,
                   m_, false);
    for (int64_t r = 0; r < n; ++r) {
      table_.finish(by_rows + r * padded_width_, a + r * padded_width_, row_sums_[from + r],
                    scale(), data(student_grad) + (begin + from + r) * width_, width_);
    }
  }

  // Row i of a block from products to ∂L/∂x.
  void row(const Problem<Real>& problem, int64_t begin, int64_t i, Real* v, Buffers own,
           int64_t r) {
    int64_t whole = ceil_to(m_, kWhole), teacher_width = a_.teacher.size(1);
    bool slopes = (wanted_.student || wanted_.keys) && !is_linear(student_.kernel);
    bool differentiates = slopes || wanted_.parameters;
    bool distance = is_distance(student_.kernel);
    Real* t = own.teacher + r * stride_;
    Real square = distance ? table_.square(rows_ + i * padded_width_, width_) : Real(0);
    Real teacher_square =
        distance ? table_.square(teacher_rows_ + i * teacher_width, teacher_width) : Real(0);
    if (differentiates) memcpy(own.products, v, whole * sizeof(Real));
    if (wanted_.teacher_parameters) memcpy(own.teacher_products, t, whole * sizeof(Real));
    table_.scores(student_, square, v, whole);
    table_.scores(teacher_, teacher_square, t, whole);
    if (a_.exclude_diagonal) v[begin + i] = t[begin + i] = -infinity<Real>();
    for (int64_t j = 0; key_mask_ != nullptr && j < m_; ++j) {
      if (!key_mask_[j]) v[j] = t[j] = -infinity<Real>();
    }
    if constexpr (sizeof(Real) == 4) {
      kd::kernels().forward_float(problem, i, i + 1);
    } else {
      kd::kernels().forward_double(problem, i, i + 1);
    }
    row_sums_[i] = 0;
    double* sums = parameter_sums_.data() + 4 * (begin + i);
    if (differentiates) {
      RowSums of_row =
          table_.differentiate(student_, square, own.products, v, whole, wanted_.parameters);
      if (distance) row_sums_[i] = static_cast<Real>(of_row.v);
      sums[0] = of_row.gamma;
      sums[1] = of_row.temperature;
    }
    if (wanted_.teacher_parameters) {
      RowSums of_row =
          table_.differentiate(teacher_, teacher_square, own.teacher_products, t, whole, true);
      sums[2] = of_row.gamma;
      sums[3] = of_row.temperature;
    }
  }

  // ∂φ/∂x where the kernels left it out.
  Real scale() const { return is_linear(student_.kernel) ? student_.slope() : Real(1); }

  void finish_keys() {
    Real* out = data(keys_grad);
    if (n_ == 0) {
      for (int64_t i = 0; i < m_ * width_; ++i) out[i] = 0;
      return;
    }
    const Real* keys = data(a_.student_keys);
    torch::stable::parallel_for(0, m_, grain_of(4 * width_), [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) {
        table_.finish(by_keys_ + j * padded_width_, keys + j * width_, key_sums_[j], scale(),
                      out + j * width_, width_);
      }
    });
  }

  void reduce() {
    Real* out = data(loss);
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (reduction_ == Reduction::none) out[i] = totals_[i];
      sum += totals_[i];
    }
    if (reduction_ != Reduction::none) *out = static_cast<Real>(sum);
    if (parameter_grads.numel() == 0) return;
    double sums[4] = {};
    for (int64_t i = 0; i < n_; ++i) {
      for (int k = 0; k < 4; ++k) sums[k] += parameter_sums_[4 * i + k];
    }
    for (int k = 0; k < 4; ++k) data(parameter_grads)[k] = static_cast<Real>(sums[k]);
  }

  static constexpr int64_t kWhole = 16;  // the row kernels' kLanes

  const Arguments& a_;
  const Wanted wanted_;
  const Kernels<Real>& table_;
  const int64_t n_, m_, width_, padded_width_;
  Scores<Real> student_{}, teacher_{};
  Divergence divergence_;
  Reduction reduction_;
  const Real *weights_ = nullptr, *keys_ = nullptr;
  const bool* key_mask_ = nullptr;
  int64_t panels_ = 0, padded_keys_ = 0, stride_ = 0;
  std::vector<Tensor> keeping_;
  const Real *student_panels_ = nullptr, *teacher_panels_ = nullptr;
  // Of a block: features, scores and then their gradient, the row kernel's lines, Σ ∂L/∂x.
  Real *rows_ = nullptr, *teacher_rows_ = nullptr, *v_ = nullptr;
  Real *lines_ = nullptr, *row_sums_ = nullptr, *by_rows_ = nullptr;
  Real *by_keys_ = nullptr, *key_sums_ = nullptr;
  std::vector<uint8_t> masks_;
  std::vector<Real> totals_;
  std::vector<double> parameter_sums_;
};

#define KD_SIMILARITY                                                                        \
  Tensor student, Tensor student_keys, Tensor teacher, Tensor teacher_keys,                  \
      OptionalTensor row_weights, OptionalTensor key_mask, OptionalTensor parameters,        \
      double gamma, double temperature, double teacher_gamma, double teacher_temperature,    \
      std::string kernel, std::string divergence, double first, OptionalTensor first_tensor, \
      double second, OptionalTensor second_tensor, bool exclude_diagonal, std::string reduction
#define KD_TAKE_SIMILARITY                                                                        \
  Arguments {                                                                                     \
    student, student_keys, teacher, teacher_keys, row_weights, key_mask, parameters, gamma,       \
        temperature, teacher_gamma, teacher_temperature, kernel, divergence, first, first_tensor, \
        second, second_tensor, exclude_diagonal, reduction                                        \
  }

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Arguments& arguments, Wanted wanted) {
  auto results = [&](auto loss) {
    loss.run();
    return std::make_tuple(loss.loss, loss.student_grad, loss.keys_grad, loss.parameter_grads);
  };
  return dtype_of(arguments.student) == Dtype::float64 ? results(Loss<double>(arguments, wanted))
                                                       : results(Loss<float>(arguments, wanted));
}

Tensor similarity_loss(KD_SIMILARITY) {
  return std::get<0>(run(KD_TAKE_SIMILARITY, {false, false, false, false}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_loss_and_grad(KD_SIMILARITY,
                                                                    bool student_grad,
                                                                    bool keys_grad,
                                                                    bool parameter_grads,
                                                                    bool teacher_parameter_grads) {
  return run(KD_TAKE_SIMILARITY,
             {student_grad, keys_grad, parameter_grads, teacher_parameter_grads});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("similarity_loss", TORCH_BOX(&similarity_loss));
  m.impl("similarity_loss_and_grad", TORCH_BOX(&similarity_loss_and_grad));
}

}  // namespace kd::similarity
