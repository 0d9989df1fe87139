// The pybind11 module adsc_kernels._C: the host planner (integers in, one packed int32 buffer out),
// the page rule of compact_paged_kv_, whether tensors share memory, and what this build is made of.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "overlap.h"
#include "pages.h"
#include "planner.h"

namespace py = pybind11;

namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style>;
using Int64Array = py::array_t<int64_t, py::array::c_style>;

// An int, or anything with __index__; a bool or a float raises.
int64_t to_int(PyObject* item, const char* name) {
  if (PyLong_CheckExact(item)) {
    const int64_t value = PyLong_AsLongLong(item);
    if (value != -1 || !PyErr_Occurred()) return value;
    PyErr_Clear();
  } else if (!PyBool_Check(item)) {
    PyObject* index = PyNumber_Index(item);
    if (index != nullptr) {
      const int64_t value = PyLong_AsLongLong(index);
      Py_DECREF(index);
      if (!PyErr_Occurred()) return value;
    }
    PyErr_Clear();
  }
  throw py::type_error(std::string(name) + ": expected ints of at most 64 bits, got " +
                       Py_TYPE(item)->tp_name);
}

py::object as_fast_sequence(py::handle items, const char* name) {
  PyObject* sequence = PySequence_Fast(items.ptr(), "");
  if (sequence == nullptr) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + ": expected a sequence, got " +
                         Py_TYPE(items.ptr())->tp_name);
  }
  return py::reinterpret_steal<py::object>(sequence);
}

// Calls visit(values, width) for every row of ints; each is as long as `widths` allows.
template <class Visit>
void for_each_row(py::handle items, const char* name, std::initializer_list<Py_ssize_t> widths,
                  Visit visit) {
  const py::object rows = as_fast_sequence(items, name);
  int64_t values[5];
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(rows.ptr()); ++i) {
    const py::object row = as_fast_sequence(PySequence_Fast_GET_ITEM(rows.ptr(), i), name);
    const Py_ssize_t width = PySequence_Fast_GET_SIZE(row.ptr());
    if (std::find(widths.begin(), widths.end(), width) == widths.end()) {
      std::string expected;
      for (const Py_ssize_t w : widths) {
        expected += (expected.empty() ? "" : " or ") + std::to_string(w);
      }
      throw py::value_error(std::string(name) + ": expected entries of " + expected +
                            " ints, got " + std::to_string(width) + " in entry " +
                            std::to_string(i));
    }
    for (Py_ssize_t k = 0; k < width; ++k) {
      values[k] = to_int(PySequence_Fast_GET_ITEM(row.ptr(), k), name);
    }
    visit(values, width);
  }
}

std::vector<int64_t> to_ints(py::handle items, const char* name) {
  const py::object values = as_fast_sequence(items, name);
  std::vector<int64_t> result(PySequence_Fast_GET_SIZE(values.ptr()));
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = to_int(PySequence_Fast_GET_ITEM(values.ptr(), i), name);
  }
  return result;
}

adsc::VisionSpan to_span(const int64_t* row, Py_ssize_t width_of_row, bool grid) {
  const auto fail = [&](const std::string& expected) {
    throw py::value_error("vision_spans: the span (sequence " + std::to_string(row[0]) +
                          ", start " + std::to_string(row[1]) + ", length " +
                          std::to_string(row[2]) + "): expected " + expected);
  };
  const int64_t length = row[2];
  if (width_of_row == 3) {
    if (grid) fail("a height and a width for pattern 'grid'");
    return {row[0], row[1], length, 1, length, std::max<int64_t>(length, 1)};
  }
  const int64_t height = row[3], width = row[4];
  if (height < 1 || width < 1 || length % height != 0 || length / height < width) {
    fail(
        "height * width tokens, or height rows of width vision tokens plus the same number of "
        "text tokens each, got height " +
        std::to_string(height) + " and width " + std::to_string(width));
  }
  return {row[0], row[1], length, height, width, length / height};
}

// Boundaries are (pattern, numerator, denominator), or under grid (pattern, row numerator, row
// denominator, column numerator, column denominator).
std::vector<adsc::Boundary> to_boundaries(py::handle items) {
  std::vector<adsc::Boundary> boundaries;
  for_each_row(items, "boundaries", {3, 5}, [&](const int64_t* v, Py_ssize_t width) {
    const auto pattern = static_cast<int32_t>(v[0]);
    if (width == 5) {
      boundaries.push_back({.pattern = pattern,
                            .grid = true,
                            .keep_rows = {v[1], v[2]},
                            .keep_columns = {v[3], v[4]}});
    } else {
      boundaries.push_back({.pattern = pattern, .keep_columns = {v[1], v[2]}});
    }
  });
  return boundaries;
}

// -> (tables, offsets, cached, rounded): `tables` holds every stage's cu_seqlens and segments one
// after the other; `offsets[s]` says where stage s's begin, how many segments it has and whether it
// drops; `rounded` has a row (sequence, start, length, stage, wanted, kept) for each rounding.
py::tuple plan(py::object boundaries, py::object cu_seqlens, py::object spans, py::object chunks,
               int64_t align) {
  const std::vector<adsc::Boundary> rules = to_boundaries(boundaries);
  const bool grid = !rules.empty() && rules.front().grid;
  const std::vector<int64_t> bounds = to_ints(cu_seqlens, "cu_seqlens");
  std::vector<adsc::VisionSpan> layout;
  for_each_row(spans, "vision_spans", {3, 5}, [&](const int64_t* v, Py_ssize_t width) {
    layout.push_back(to_span(v, width, grid));
  });
  std::vector<adsc::Chunk> parts;
  if (chunks.is_none()) {
    for (size_t b = 1; b < bounds.size(); ++b) parts.push_back({0, bounds[b] - bounds[b - 1]});
  } else {
    for_each_row(chunks, "chunks", {2},
                 [&](const int64_t* v, Py_ssize_t) { parts.push_back({v[0], v[1]}); });
  }
  const std::vector<adsc::StageTables> stages =
      adsc::make_plan(rules, bounds, std::move(layout), parts, align);

  py::ssize_t size = 0, roundings = 0;
  for (const auto& stage : stages) {
    roundings += static_cast<py::ssize_t>(stage.rounded.size());
    size += stage.cu_seqlens.size() + stage.segments.size() * adsc::kSegmentColumns;
  }
  const py::ssize_t batch = static_cast<py::ssize_t>(bounds.size()) - 1;
  Int32Array tables(size);
  Int32Array cached({static_cast<py::ssize_t>(stages.size()), batch});
  int32_t* out = tables.mutable_data();
  int32_t* cached_out = cached.mutable_data();
  py::list offsets;
  for (const auto& stage : stages) {
    const py::ssize_t begin = out - tables.data();
    out = std::copy(stage.cu_seqlens.begin(), stage.cu_seqlens.end(), out);
    const auto* words = reinterpret_cast<const int32_t*>(stage.segments.data());
    out = std::copy(words, words + stage.segments.size() * adsc::kSegmentColumns, out);
    cached_out = std::copy(stage.cached.begin(), stage.cached.end(), cached_out);
    offsets.append(py::make_tuple(begin, stage.segments.size(), stage.identity));
  }
  Int64Array rounded({roundings, py::ssize_t{6}});
  int64_t* rounded_out = rounded.mutable_data();
  for (size_t s = 0; s < stages.size(); ++s) {
    for (const adsc::Rounding& r : stages[s].rounded) {
      for (const int64_t value : {r.span.sequence, r.span.start, r.span.length,
                                  static_cast<int64_t>(s), r.wanted, r.kept}) {
        *rounded_out++ = value;
      }
    }
  }
  return py::make_tuple(tables, offsets, cached, rounded);
}

// The source row of every output row of a segment table [S, 6].
Int64Array expand(const Int32Array& segments, int64_t rows) {
  Int64Array out(rows);
  adsc::expand(reinterpret_cast<const adsc::Segment*>(segments.data()),
               static_cast<int32_t>(segments.shape(0)), rows, out.mutable_data());
  return out;
}

Int32Array compress(const Int64Array& sources) {
  const std::vector<adsc::Segment> table = adsc::compress(sources.data(), sources.shape(0));
  Int32Array out({static_cast<py::ssize_t>(table.size()), py::ssize_t{adsc::kSegmentColumns}});
  const auto* words = reinterpret_cast<const int32_t*>(table.data());
  std::copy(words, words + table.size() * adsc::kSegmentColumns, out.mutable_data());
  return out;
}

Int64Array to_array(const std::vector<int64_t>& values) {
  return Int64Array(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<int64_t> boundaries_of(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> boundaries{0};
  for (const int64_t length : lengths) boundaries.push_back(boundaries.back() + length);
  return boundaries;
}

// -> (released, free), or None where that takes rows that the host doesn't know: sources is None,
// and edit_table is set. A fault raises ValueError.
py::object check_pages(const Int64Array& table, const std::vector<int64_t>& prefix_lens,
                       const std::vector<int64_t>& source_lens,
                       const std::vector<int64_t>& kept_lens, const std::vector<int64_t>& seq_lens,
                       const std::optional<Int64Array>& sources, int64_t block_size,
                       int64_t num_blocks, bool edit_table, const Int64Array& read_only_blocks,
                       const std::string& table_name) {
  const std::vector<int64_t> cu_kept = boundaries_of(kept_lens);
  const std::vector<int64_t> cu_rows = boundaries_of(source_lens);
  const auto batch = static_cast<py::ssize_t>(seq_lens.size());
  const int64_t longest =
      seq_lens.empty() ? 0 : *std::max_element(seq_lens.begin(), seq_lens.end());
  if (table.ndim() != 2 || table.shape(0) != batch || table.shape(1) * block_size < longest ||
      (sources.has_value() && sources->size() != cu_kept.back())) {
    throw py::value_error("check_pages: expected a table and rows for all of the lengths");
  }
  adsc::PagedCache cache{.read_only_blocks = {.blocks = {read_only_blocks.data(), true},
                                              .count = read_only_blocks.size()},
                         .rows_known = sources.has_value(),
                         .table_name = table_name.c_str()};
  adsc::Compaction& c = cache.compaction;
  c.batch = static_cast<int32_t>(batch);
  if (sources.has_value()) {
    c.indices = {sources->data(), true};
    c.num_indices = sources->size();
  }
  c.cu_kept = {cu_kept.data(), true};
  c.cu_rows = {cu_rows.data(), true};
  c.prefix_lens = {prefix_lens.data(), true};
  c.seq_lens = {seq_lens.data(), true};
  c.placement = adsc::Placement::kPaged;
  c.table = {table.data(), true};
  c.table_stride = c.table_width = table.shape(1);
  c.num_blocks = num_blocks;
  c.num_tokens = block_size;
  c.edit_table = edit_table;

  const std::string fault = adsc::find_page_fault(cache);
  if (!fault.empty()) throw py::value_error(fault);
  if (edit_table && !cache.rows_known) return py::none();
  const adsc::LeftOverBlocks left = adsc::find_left_over_blocks(cache);
  py::tuple released(batch);
  for (py::ssize_t b = 0; b < batch; ++b) released[b] = to_array(left.released[b]);
  return py::make_tuple(released, to_array(left.free));
}

// (address, bytes of an element, shape, strides) of a tensor.
using Placed = std::tuple<uintptr_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

std::vector<adsc::StridedMemory> memory_of(const std::vector<Placed>& tensors) {
  std::vector<adsc::StridedMemory> memory;
  for (const auto& [address, element_bytes, sizes, strides] : tensors) {
    if (strides.size() != sizes.size()) throw py::value_error("expected a stride for each size");
    memory.push_back({address, element_bytes, sizes.data(), strides.data(), sizes.size()});
  }
  return memory;
}

// -> (the two of them that share memory, or None; how many pairs had to be compared)
std::pair<std::optional<adsc::IndexPair>, int64_t> find_overlap(
    const std::vector<Placed>& tensors) {
  const adsc::OverlapSearch search = adsc::find_overlap(memory_of(tensors));
  return {search.found, search.pairs};
}

std::optional<adsc::IndexPair> find_shared(const std::vector<Placed>& read,
                                           const std::vector<Placed>& written) {
  return adsc::find_shared(memory_of(read), memory_of(written));
}

std::optional<std::string> some(const char* text) {
  return *text ? std::optional<std::string>(text) : std::nullopt;
}

py::object cuda_archs() {
  std::vector<std::string> archs;
  std::istringstream stream(ADSC_CUDA_ARCHS);
  for (std::string arch; std::getline(stream, arch, ';');) archs.push_back(arch);
  if (archs.empty()) return py::none();
  return py::tuple(py::cast(archs));
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADSC_VERSION;
  info["compiler"] = ADSC_COMPILER;
  info["build_type"] = ADSC_BUILD_TYPE;
  info["cxx_flags"] = ADSC_CXX_FLAGS;
  info["torch"] = ADSC_TORCH_VERSION;
  info["cuda_compiler"] = some(ADSC_CUDA_COMPILER);
  info["cuda_archs"] = cuda_archs();
  info["cuda_reason"] = some(ADSC_CUDA_REASON);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The host side of adsc_kernels in C++: the planner, the page rule, build information.";
  m.def(
      "build_info", &build_info,
      "What this build is made of: version, compiler, build_type, cxx_flags, torch (the one built\n"
      "against), cuda_compiler, cuda_archs, and cuda_reason: why there is no CUDA, or None.");
  m.def("plan", &plan, py::arg("boundaries"), py::arg("cu_seqlens"), py::arg("vision_spans"),
        py::arg("chunks"), py::arg("align") = 1);
  m.def("expand", &expand, py::arg("segments").noconvert(), py::arg("rows"));
  m.def("compress", &compress, py::arg("sources").noconvert());
  m.def("check_pages", &check_pages);
  m.def("find_overlap", &find_overlap);
  m.def("find_shared", &find_shared);
  m.def("kept_count", &adsc::kept_count);
  m.def("aligned_kept_count", &adsc::aligned_kept_count);
  m.def("kept_index", &adsc::kept_index);
  m.def("kept_before", &adsc::kept_before);
}
