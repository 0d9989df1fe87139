// The planner without Python: known tables, the chunk rule, composition, and refusals. The property
// tests against a token-by-token oracle are in python_tests/test_plan.py.
#include <stdexcept>

#include "check.h"
#include "planner.h"

namespace adsc {
namespace {

const std::vector<Boundary> kQuarterTwice(2, {.keep_columns = {1, 4}});

bool equal(const Segment& a, const Segment& b) {
  return a.dst == b.dst && a.src == b.src && a.span == b.span && a.keep == b.keep &&
         a.first == b.first && a.pattern == b.pattern;
}

void test_known_plan() {
  const auto stages = make_plan(kQuarterTwice, {0, 20}, {{0, 2, 16, 1, 16, 16}}, {{0, 20}});
  CHECK(stages.size() == 3);
  CHECK(stages[0].identity && !stages[1].identity && !stages[2].identity);
  CHECK(stages[1].segments.size() == 3);
  CHECK(equal(stages[1].segments[0], {0, 0, 2, 2, 0, kStart}));
  CHECK(equal(stages[1].segments[1], {2, 2, 16, 4, 0, kStart}));
  CHECK(equal(stages[1].segments[2], {6, 18, 2, 2, 0, kStart}));
  CHECK(stages[2].cu_seqlens[1] == 5);
}

void test_chunk_begins_inside_a_span() {
  const auto stages = make_plan(kQuarterTwice, {0, 20}, {{0, 2, 16, 1, 16, 16}}, {{7, 20}});
  // Positions 7 to 17 hold the span's rows 5 to 15, of which 8 and 12 stay; row 0 of the span would
  // lie five rows before the chunk.
  CHECK(stages[1].cached[0] == 4 && stages[2].cached[0] == 3);
  CHECK(equal(stages[1].segments[0], {0, -5, 16, 4, 2, kStart}));
  int64_t sources[4];
  expand(stages[1].segments.data(), 2, 4, sources);
  CHECK(sources[0] == 3 && sources[1] == 7 && sources[2] == 11 && sources[3] == 12);
}

void test_compress() {
  const int64_t sources[] = {0, 1, 2, 6, 10, 14, 15};
  const auto table = compress(sources, 7);
  int64_t out[7];
  expand(table.data(), static_cast<int32_t>(table.size()), 7, out);
  for (int i = 0; i < 7; ++i) CHECK(out[i] == sources[i]);
  CHECK(table.size() == 3);
  CHECK(compress(sources, 0).empty());
}

void test_refusals() {
  const auto refused = [](std::vector<int64_t> cu, std::vector<VisionSpan> spans,
                          std::vector<Chunk> chunks) {
    try {
      make_plan(kQuarterTwice, cu, spans, chunks);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(!refused({0, 4}, {{0, 0, 2, 1, 2, 2}, {0, 2, 2, 1, 2, 2}}, {{0, 4}}));
  CHECK(refused({0, 4}, {{0, 0, 3, 1, 3, 3}, {0, 2, 2, 1, 2, 2}}, {{0, 4}}));
  CHECK(refused({0, 4}, {{0, 2, 3, 1, 3, 3}}, {{0, 4}}));
  CHECK(refused({0, 4}, {{1, 0, 1, 1, 1, 1}}, {{0, 4}}));
  CHECK(refused({0, 4}, {}, {{0, 5}}));
  CHECK(refused({0, 4}, {}, {}));
  CHECK(refused({1, 4}, {}, {{0, 3}}));
  CHECK(refused({}, {}, {}));
}

}  // namespace
}  // namespace adsc

int main() {
  adsc::test_known_plan();
  adsc::test_chunk_begins_inside_a_span();
  adsc::test_compress();
  adsc::test_refusals();
  return adsc::test::failures() != 0;
}
