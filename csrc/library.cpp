// Table of contents: every operator of the library, one schema each, with one line of meaning.
// Implementations: csrc/ops/<op>_cpu.cpp and csrc/ops/<op>_cuda.cu. Public functions, fakes and
// autograd: compact_ops/<op>.py. Specification in plain torch: compact_ops/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(compact, m) {
  // out[rows[m]] += weight[group[m]] * unit[m], deterministic: the multi-teacher gradient accumulation.
  m.def(
      "accumulate_weighted(Tensor unit, Tensor rows, Tensor weight, Tensor group, int num_rows) "
      "-> Tensor");
}
