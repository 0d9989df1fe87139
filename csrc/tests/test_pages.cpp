// The page rule on small tables: what it refuses, and what it leaves over. The drawn cases are in
// python_tests/test_compact.py.
#include <string>
#include <vector>

#include "check.h"
#include "pages.h"

namespace adsc {
namespace {

// Two sequences of 8 rows in blocks of 2, of which rows 0, 3, 6, 7 and 0, 1, 2, 3 stay.
struct Case {
  std::vector<int32_t> cu_kept{0, 4, 8};
  std::vector<int32_t> cu_rows{0, 8, 16};
  std::vector<int64_t> kept{0, 3, 6, 7, 0, 1, 2, 3};
  std::vector<int32_t> table{5, 4, 3, 2, 6, 7, 8, 9};
  std::vector<int32_t> read_only;
  bool edit_table = false;
  bool rows_known = true;

  PagedCache cache() const {
    PagedCache cache{
        .read_only_blocks = {{read_only.data()}, static_cast<int64_t>(read_only.size())},
        .rows_known = rows_known};
    Compaction& c = cache.compaction;
    c.batch = 2;
    c.indices = {kept.data(), true};
    c.num_indices = static_cast<int64_t>(kept.size());
    c.cu_kept = {cu_kept.data()};
    c.cu_rows = {cu_rows.data()};
    c.placement = Placement::kPaged;
    c.table = {table.data()};
    c.table_stride = c.table_width = 4;
    c.num_blocks = 10;
    c.num_tokens = 2;
    c.edit_table = edit_table;
    return cache;
  }

  bool refused(const std::string& words) const {
    const std::string fault = find_page_fault(cache());
    return words.empty() ? fault.empty() : fault.find(words) != std::string::npos;
  }
};

using Blocks = std::vector<int64_t>;

void test_left_over() {
  Case of;
  CHECK(of.refused(""));
  LeftOverBlocks left = find_left_over_blocks(of.cache());
  CHECK((left.released == std::vector<Blocks>{{3, 2}, {8, 9}}));
  CHECK((left.free == Blocks{2, 3, 8, 9}));
  // Rows 6 and 7 lie right in the last block, rows 0 and 3 go to the block of row 3.
  of.edit_table = true;
  left = find_left_over_blocks(of.cache());
  CHECK((left.released == std::vector<Blocks>{{5, 3}, {8, 9}}));
  CHECK((left.free == Blocks{3, 5, 8, 9}));
}

void test_shared_and_read_only_blocks() {
  Case of;
  of.table = {5, 4, 3, 2, 6, 7, 3, 9};
  CHECK(
      of.refused("block_table: expected every block once, or named in read_only_blocks, got "
                 "block 3 2 times, again at [1, 2]"));
  of.read_only = {3, 99, -1};
  CHECK(of.refused(""));
  LeftOverBlocks left = find_left_over_blocks(of.cache());
  CHECK((left.released == std::vector<Blocks>{{3, 2}, {3, 9}}));
  CHECK((left.free == Blocks{2, 9}));
  of.read_only = {3, 6};  // sequence 1 keeps its first rows where they are
  CHECK(of.refused(""));
  of.read_only = {3, 4};
  CHECK(of.refused("read_only_blocks: expected no move into block 4, but sequence 0"));
  of.table[7] = 10;
  CHECK(of.refused("block_table: expected blocks in [0, 10), got 10 at [1, 3]"));
}

void test_rows_that_the_host_cannot_read() {
  Case of;
  of.rows_known = false;
  of.read_only = {8};
  CHECK(of.refused(""));  // behind the new end
  of.edit_table = true;
  CHECK(of.refused("expected no move into block 8, but sequence 1"));
  of.edit_table = false;
  of.read_only = {6};
  CHECK(of.refused("expected no move into block 6, but sequence 1"));
}

}  // namespace
}  // namespace adsc

int main() {
  adsc::test_left_over();
  adsc::test_shared_and_read_only_blocks();
  adsc::test_rows_that_the_host_cannot_read();
  return adsc::test::failures() != 0;
}
