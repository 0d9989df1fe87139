// The planner without Python: survivors of a small batch by hand, and chunks against the whole.
#include "planner.h"

#include <stdexcept>

#include "check.h"

using namespace adsc;

namespace {

using Rows = std::vector<int64_t>;

// Two prompts of 10 and 4 tokens; the first holds 6 vision tokens from position 2.
const std::vector<int64_t> kBounds = {0, 10, 14};
const std::vector<VisionSpan> kSpans = {{0, 2, 6, 1, 6, 6}};
const std::vector<BoundaryRule> kHalves = {{false, kStart, {1, 2}, {1, 1}},
                                           {false, kStart, {1, 2}, {1, 1}}};

Rows sources(const StageTables& stage) {
  Rows rows(stage.cu_seqlens.back());
  expand(stage.segments.data(), static_cast<int32_t>(stage.segments.size()),
         static_cast<int64_t>(rows.size()), rows.data());
  return rows;
}

void survivors() {
  const auto stages = make_plan(kHalves, kBounds, kSpans, {{0, 10}, {0, 4}});
  CHECK(stages.size() == 3);
  CHECK(stages[0].identity && !stages[1].identity && !stages[2].identity);
  CHECK((stages[0].cu_seqlens == std::vector<int32_t>{0, 10, 14}));
  CHECK((stages[1].cu_seqlens == std::vector<int32_t>{0, 7, 11}));  // 3 of 6 stay
  CHECK((stages[2].cu_seqlens == std::vector<int32_t>{0, 6, 10}));  // 2 of 3 stay
  CHECK((sources(stages[1]) == Rows{0, 1, 2, 4, 6, 8, 9, 10, 11, 12, 13}));
  CHECK((sources(stages[2]) == Rows{0, 1, 2, 3, 5, 6, 7, 8, 9, 10}));
}

// Wherever the first prompt is cut, the two chunks keep together what the whole keeps, and the second
// finds in the cache what the first has left there.
void chunks() {
  const auto whole = make_plan(kHalves, kBounds, kSpans, {{0, 10}, {0, 4}});
  for (int64_t cut = 0; cut <= 10; ++cut) {
    const auto head = make_plan(kHalves, kBounds, kSpans, {{0, cut}, {0, 4}});
    const auto tail = make_plan(kHalves, kBounds, kSpans, {{cut, 10}, {4, 4}});
    for (size_t s = 0; s < whole.size(); ++s) {
      CHECK(head[s].cu_seqlens[1] + tail[s].cu_seqlens[1] == whole[s].cu_seqlens[1]);
      CHECK(head[s].cached[0] == 0);
      CHECK(tail[s].cached[0] == head[s].cu_seqlens[1]);
      CHECK(tail[s].cached[1] == whole[s].cu_seqlens[2] - whole[s].cu_seqlens[1]);
    }
  }
}

void compress_is_the_inverse_of_expand() {
  const Rows rows = {0, 1, 2, 5, 8, 11, 12, 40};
  const std::vector<Segment> table = compress(rows.data(), static_cast<int64_t>(rows.size()));
  Rows back(rows.size());
  expand(table.data(), static_cast<int32_t>(table.size()), static_cast<int64_t>(back.size()),
         back.data());
  CHECK(back == rows);
  CHECK(compress(nullptr, 0).empty());
}

void bad_layouts_throw() {
  const auto throws = [](std::vector<VisionSpan> spans, std::vector<Chunk> parts) {
    try {
      make_plan(kHalves, kBounds, spans, parts);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(throws({{0, 5, 6, 1, 6, 6}}, {{0, 10}, {0, 4}}));                      // leaves its prompt
  CHECK(throws({{0, 2, 6, 1, 6, 6}, {0, 7, 2, 1, 2, 2}}, {{0, 10}, {0, 4}}));  // overlap
  CHECK(throws(kSpans, {{0, 11}, {0, 4}}));                                    // past the end
  CHECK(!throws(kSpans, {{0, 10}, {0, 4}}));
}

}  // namespace

int main() {
  survivors();
  chunks();
  compress_is_the_inverse_of_expand();
  bad_layouts_throw();
  return failures == 0 ? 0 : 1;
}
