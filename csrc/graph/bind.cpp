// Binds the graph assembly to Python as compact.graphs._graph: numpy arrays in, numpy arrays out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "graph/graph.h"

namespace py = pybind11;

namespace {

using Ints = py::array_t<int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

std::span<const int64_t> view(const Ints& array, const char* name) {
  if (array.ndim() != 1) {
    throw std::invalid_argument(std::string("assemble: ") + name + " must have 1 dimension, got " +
                                std::to_string(array.ndim()));
  }
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// An offsets array starts at 0, never decreases, and ends at the size of the array that it slices.
void check_offsets(std::span<const int64_t> offsets, std::size_t size, const char* name) {
  bool good =
      !offsets.empty() && offsets.front() == 0 && offsets.back() == static_cast<int64_t>(size);
  for (std::size_t i = 1; good && i < offsets.size(); ++i) good = offsets[i] >= offsets[i - 1];
  if (!good) {
    throw std::invalid_argument(std::string("assemble: ") + name + " must rise from 0 to " +
                                std::to_string(size));
  }
}

// Returns a numpy array that owns the vector's memory; `columns` > 0 makes it two-dimensional.
py::array_t<int64_t> give(std::vector<int64_t>&& vector, py::ssize_t columns = 0) {
  auto* owned = new std::vector<int64_t>(std::move(vector));
  py::capsule free(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  const auto size = static_cast<py::ssize_t>(owned->size());
  if (columns == 0) return py::array_t<int64_t>({size}, owned->data(), free);
  return py::array_t<int64_t>({size / columns, columns}, owned->data(), free);
}

py::dict assemble(const Ints& problem_offsets, const Ints& step_offsets, const Ints& item_offsets,
                  const Ints& items, const Ints& content, const Floats& state, double threshold) {
  compact::graph::Steps steps{};
  steps.problem_offsets = view(problem_offsets, "problem_offsets");
  steps.step_offsets = view(step_offsets, "step_offsets");
  steps.item_offsets = view(item_offsets, "item_offsets");
  steps.items = view(items, "items");
  steps.content = view(content, "content");
  check_offsets(steps.step_offsets, steps.content.size(), "step_offsets");
  check_offsets(steps.problem_offsets, steps.step_offsets.size() - 1, "problem_offsets");
  check_offsets(steps.item_offsets, steps.items.size(), "item_offsets");
  if (steps.item_offsets.size() != steps.content.size() + 1) {
    throw std::invalid_argument(
        "assemble: item_offsets must have S + 1 = " + std::to_string(steps.content.size() + 1) +
        " entries, got " + std::to_string(steps.item_offsets.size()));
  }
  if (state.ndim() != 2 || state.shape(0) != static_cast<py::ssize_t>(steps.content.size())) {
    throw std::invalid_argument("assemble: state must have shape [S, H] with S = " +
                                std::to_string(steps.content.size()));
  }
  steps.state = state.data();
  steps.width = state.shape(1);
  compact::graph::Graphs graphs;
  {
    py::gil_scoped_release release;
    graphs = compact::graph::assemble(steps, threshold);
  }
  py::dict out;
  out["matches"] = give(std::move(graphs.matches), 2);
  out["step_class"] = give(std::move(graphs.step_class));
  out["class_offsets"] = give(std::move(graphs.class_offsets));
  out["class_members"] = give(std::move(graphs.class_members));
  out["edge_offsets"] = give(std::move(graphs.edge_offsets));
  out["edges"] = give(std::move(graphs.edges), 2);
  out["edge_count"] = give(std::move(graphs.edge_count));
  return out;
}

}  // namespace

PYBIND11_MODULE(_graph, module) {
  module.doc() = "Consensus-graph assembly on plain arrays; see csrc/graph/graph.h.";
  module.def("assemble", &assemble, py::arg("problem_offsets"), py::arg("step_offsets"),
             py::arg("item_offsets"), py::arg("items"), py::arg("content"), py::arg("state"),
             py::arg("threshold"),
             "Matches the steps of each problem's rationales and joins the classes by edges.");
}
