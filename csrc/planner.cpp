#include "planner.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace adsc {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kText = -1;

// A stretch of one sequence in one stage: text, or the vision tokens numbered [begin, end) among a
// span's survivors in that stage.
struct Run {
  int64_t span;  // index into the spans, or kText
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// A span's survivors in one stage: height x width under grid, one row otherwise.
struct Extent {
  int64_t height;
  int64_t width;
};

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string text(int64_t value) { return std::to_string(value); }

Extent next_extent(const Boundary& boundary, Extent e) {
  if (!boundary.grid) return {1, kept(e.height * e.width, boundary.keep_columns)};
  return {kept(e.height, boundary.keep_rows), kept(e.width, boundary.keep_columns)};
}

// How many of the first v survivors of one stage are survivors of the next.
int64_t survivors_before(const Boundary& boundary, Extent e, Extent next, int64_t v) {
  if (!boundary.grid) return kept_before(boundary.pattern, v, e.height * e.width, next.width);
  if (v == 0) return 0;
  const int64_t row = v / e.width;
  const int64_t rows = kept_before(kStart, row, e.height, next.height);
  int64_t count = rows * next.width;
  const bool row_is_kept =
      row < e.height && kept_before(kStart, row + 1, e.height, next.height) > rows;
  if (row_is_kept) count += kept_before(kStart, v % e.width, e.width, next.width);
  return count;
}

// Appends to a stage's table; copies that continue the last one extend it.
class TableWriter {
 public:
  explicit TableWriter(std::vector<Segment>& table) : table_(table) {}

  int64_t rows() const { return rows_; }

  void copy(int64_t source, int64_t count) {
    if (count == 0) return;
    if (!table_.empty()) {
      Segment& last = table_.back();
      if (last.keep == last.span && last.first == 0 && last.src + last.span == source) {
        last.span += static_cast<int32_t>(count);
        last.keep = last.span;
        rows_ += count;
        return;
      }
    }
    push(source, count, count, 0, count, kStart);
  }

  // Kept rows [begin, end) of `keep` over `span` rows; index 0 of the span lies at row `source`.
  void sample(int64_t source, int64_t span, int64_t keep, int64_t begin, int64_t end,
              int32_t pattern) {
    if (begin == end) return;
    if (span == keep) return copy(source + begin, end - begin);
    push(source, span, keep, begin, end, pattern);
  }

 private:
  void push(int64_t source, int64_t span, int64_t keep, int64_t begin, int64_t end,
            int32_t pattern) {
    table_.push_back({static_cast<int32_t>(rows_), static_cast<int32_t>(source),
                      static_cast<int32_t>(span), static_cast<int32_t>(keep),
                      static_cast<int32_t>(begin), pattern});
    rows_ += end - begin;
  }

  std::vector<Segment>& table_;
  int64_t rows_ = 0;
};

void append_run(std::vector<Run>& runs, Run run) {
  if (run.size() == 0) return;
  if (run.span == kText && !runs.empty() && runs.back().span == kText) {
    runs.back().end += run.size();
    return;
  }
  runs.push_back(run);
}

// How many of a span's vision tokens lie before position p of its sequence.
int64_t tokens_before(const VisionSpan& span, int64_t p) {
  const int64_t offset = std::clamp<int64_t>(p - span.start, 0, span.length);
  if (offset == span.length) return span.height * span.width;
  if (offset < span.width) return offset;
  const int64_t row = offset / span.pitch;
  return row * span.width + std::min(offset % span.pitch, span.width);
}

// The stretches of positions [chunk.begin, chunk.end), from the layout of the whole prompt.
void layout_runs(const VisionSpan* spans, int64_t first, int64_t last, Chunk chunk,
                 std::vector<Run>& runs) {
  runs.clear();
  int64_t p = chunk.begin;
  for (int64_t i = first; i < last && p < chunk.end; ++i) {
    const VisionSpan& span = spans[i];
    if (span.start + span.length <= p) continue;
    const int64_t text_end = std::min(span.start, chunk.end);
    if (text_end > p) {
      append_run(runs, {kText, 0, text_end - p});
      p = text_end;
    }
    const int64_t span_end = std::min(span.start + span.length, chunk.end);
    while (p < span_end) {
      // Rows without anything between them are one stretch.
      const bool dense = span.pitch == span.width;
      const int64_t column = dense ? 0 : (p - span.start) % span.pitch;
      const bool is_text = !dense && column >= span.width;
      const int64_t stretch_end =
          dense ? span_end : std::min(span_end, p - column + (is_text ? span.pitch : span.width));
      const int64_t v = tokens_before(span, p);
      append_run(runs, is_text ? Run{kText, 0, stretch_end - p} : Run{i, v, v + stretch_end - p});
      p = stretch_end;
    }
  }
  append_run(runs, {kText, 0, chunk.end - p});
}

void sample_run(const Boundary& boundary, Extent e, Extent next, const Run& run, int64_t source,
                TableWriter& writer) {
  if (!boundary.grid) {
    const int64_t n = e.height * e.width;
    writer.sample(source - run.begin, n, next.width,
                  kept_before(boundary.pattern, run.begin, n, next.width),
                  kept_before(boundary.pattern, run.end, n, next.width), boundary.pattern);
    return;
  }
  for (int64_t i = kept_before(kStart, run.begin / e.width, e.height, next.height); i < next.height;
       ++i) {
    const int64_t row_begin = kept_index(kStart, i, e.height, next.height) * e.width;
    if (row_begin >= run.end) break;
    const int64_t from = std::max(run.begin - row_begin, int64_t{0});
    const int64_t to = std::min(run.end - row_begin, e.width);
    writer.sample(source + row_begin - run.begin, e.width, next.width,
                  kept_before(kStart, from, e.width, next.width),
                  kept_before(kStart, to, e.width, next.width), kStart);
  }
}

void check_layout(const std::vector<int64_t>& cu_seqlens, const std::vector<VisionSpan>& spans,
                  const std::vector<Chunk>& chunks) {
  if (cu_seqlens.empty() || cu_seqlens.front() != 0) {
    fail("cu_seqlens: expected B + 1 ints that begin with 0, got " +
         (cu_seqlens.empty() ? std::string("none") : text(cu_seqlens.front()) + " first"));
  }
  const int64_t batch = static_cast<int64_t>(cu_seqlens.size()) - 1;
  for (int64_t b = 0; b < batch; ++b) {
    if (cu_seqlens[b + 1] < cu_seqlens[b]) {
      fail("cu_seqlens: expected ints that never decrease, got " + text(cu_seqlens[b]) + " then " +
           text(cu_seqlens[b + 1]) + " at sequence " + text(b));
    }
  }
  if (cu_seqlens.back() > kMaxRows) {
    fail("cu_seqlens: expected at most 2^31 - 1 tokens in all, got " + text(cu_seqlens.back()));
  }
  for (size_t i = 0; i < spans.size(); ++i) {
    const VisionSpan& s = spans[i];
    const auto name = [&] {
      return "vision_spans: the span (sequence " + text(s.sequence) + ", start " + text(s.start) +
             ", length " + text(s.length) + ")";
    };
    if (s.sequence < 0 || s.sequence >= batch) {
      fail(name() + ": expected a sequence in 0 to " + text(batch - 1));
    }
    const int64_t length = cu_seqlens[s.sequence + 1] - cu_seqlens[s.sequence];
    if (s.start < 0 || s.length < 0 || s.start > length || s.length > length - s.start) {
      fail(name() + ": expected it to lie inside its sequence of " + text(length) + " tokens");
    }
    if (i > 0 && spans[i - 1].sequence == s.sequence &&
        spans[i - 1].start + spans[i - 1].length > s.start) {
      fail(name() + ": expected no overlap, but the span at " + text(spans[i - 1].start) +
           " ends at " + text(spans[i - 1].start + spans[i - 1].length));
    }
  }
  if (static_cast<int64_t>(chunks.size()) != batch) {
    fail("chunks: expected one (begin, end) for each of " + text(batch) + " sequences, got " +
         text(static_cast<int64_t>(chunks.size())));
  }
  for (size_t b = 0; b < chunks.size(); ++b) {
    const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    if (chunks[b].begin < 0 || chunks[b].begin > chunks[b].end || chunks[b].end > length) {
      fail("chunks: expected 0 <= begin <= end <= " + text(length) + " for sequence " +
           text(static_cast<int64_t>(b)) + ", got (" + text(chunks[b].begin) + ", " +
           text(chunks[b].end) + ")");
    }
  }
}

}  // namespace

std::vector<StageTables> make_plan(const std::vector<Boundary>& boundaries,
                                   const std::vector<int64_t>& cu_seqlens,
                                   std::vector<VisionSpan> spans, const std::vector<Chunk>& chunks,
                                   int64_t align) {
  const auto earlier = [](const VisionSpan& a, const VisionSpan& b) {
    if (a.sequence != b.sequence) return a.sequence < b.sequence;
    // An empty span lies before the one that begins at the same place, whichever is named first.
    return a.start != b.start ? a.start < b.start : a.length < b.length;
  };
  if (!std::is_sorted(spans.begin(), spans.end(), earlier)) {
    std::sort(spans.begin(), spans.end(), earlier);
  }
  check_layout(cu_seqlens, spans, chunks);

  const size_t num_stages = boundaries.size() + 1;
  const int64_t batch = static_cast<int64_t>(cu_seqlens.size()) - 1;
  std::vector<StageTables> stages(num_stages);
  std::vector<TableWriter> writers;
  for (StageTables& stage : stages) {
    stage.cu_seqlens.reserve(batch + 1);
    stage.cu_seqlens.push_back(0);
    stage.cached.reserve(batch);
    writers.emplace_back(stage.segments);
  }

  // extents[i * num_stages + s]: span i's survivors in stage s, whatever the chunk.
  std::vector<Extent> extents(spans.size() * num_stages);
  for (size_t i = 0; i < spans.size(); ++i) {
    Extent e{spans[i].height, spans[i].width};
    const int64_t n = e.height * e.width;
    extents[i * num_stages] = e;
    for (size_t s = 1; s < num_stages; ++s) {
      e = next_extent(boundaries[s - 1], e);
      const int64_t wanted = e.height * e.width;
      const int64_t kept = aligned_kept_count(n, wanted, align);
      if (kept != wanted) stages[s].rounded.push_back({spans[i], wanted, kept});
      extents[i * num_stages + s] = boundaries[s - 1].grid ? e : Extent{1, kept};
    }
  }

  std::vector<Run> runs, next_runs;
  std::vector<int64_t> cached(num_stages);
  int64_t first = 0;  // this sequence's spans are [first, last)
  for (int64_t b = 0; b < batch; ++b) {
    int64_t last = first;
    while (last < static_cast<int64_t>(spans.size()) && spans[last].sequence == b) ++last;
    const Chunk chunk = chunks[b];

    // Survivors before the chunk: all text before it, and what each span has left there.
    std::fill(cached.begin(), cached.end(), chunk.begin);
    for (int64_t i = first; i < last; ++i) {
      if (spans[i].start >= chunk.begin) break;
      const int64_t before = tokens_before(spans[i], chunk.begin);
      const Extent* e = &extents[i * num_stages];
      int64_t survivors = before;
      for (size_t s = 1; s < num_stages; ++s) {
        survivors = survivors_before(boundaries[s - 1], e[s - 1], e[s], survivors);
        cached[s] -= before - survivors;
      }
    }

    layout_runs(spans.data(), first, last, chunk, runs);
    for (size_t s = 0; s < num_stages; ++s) {
      StageTables& stage = stages[s];
      if (s == 0) {
        for (const Run& run : runs) writers[0].copy(writers[0].rows(), run.size());
      } else {
        const Boundary& boundary = boundaries[s - 1];
        int64_t source = stages[s - 1].cu_seqlens[b];
        next_runs.clear();
        for (const Run& run : runs) {
          if (run.span == kText) {
            writers[s].copy(source, run.size());
            append_run(next_runs, run);
          } else {
            const Extent e = extents[run.span * num_stages + s - 1];
            const Extent next = extents[run.span * num_stages + s];
            sample_run(boundary, e, next, run, source, writers[s]);
            append_run(next_runs, {run.span, survivors_before(boundary, e, next, run.begin),
                                   survivors_before(boundary, e, next, run.end)});
          }
          source += run.size();
        }
        runs.swap(next_runs);
      }
      stage.cu_seqlens.push_back(static_cast<int32_t>(writers[s].rows()));
      stage.cached.push_back(static_cast<int32_t>(cached[s]));
    }
    first = last;
  }
  for (size_t s = 1; s < num_stages; ++s) {
    stages[s].identity = writers[s].rows() == writers[s - 1].rows();
  }
  return stages;
}

void expand(const Segment* table, int32_t count, int64_t out_rows, int64_t* out) {
  for (int32_t i = 0; i < count; ++i) {
    const int64_t end = i + 1 < count ? table[i + 1].dst : out_rows;
    for (int64_t row = table[i].dst; row < end; ++row) out[row] = source_row(table[i], row);
  }
}

std::vector<Segment> compress(const int64_t* sources, int64_t count) {
  std::vector<Segment> table;
  for (int64_t row = 0; row < count;) {
    const int64_t stride = row + 1 < count ? sources[row + 1] - sources[row] : 1;
    int64_t end = row + 1;
    while (end < count && sources[end] - sources[end - 1] == stride) ++end;
    // Stride d is `keep` of `keep * d` rows under kStart: j * (keep * d) / keep == j * d.
    const int64_t keep = end - row;
    table.push_back({static_cast<int32_t>(row), static_cast<int32_t>(sources[row]),
                     static_cast<int32_t>(keep * stride), static_cast<int32_t>(keep), 0, kStart});
    row = end;
  }
  return table;
}

}  // namespace adsc
