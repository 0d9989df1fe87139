// keep_caches: the tensors of a KV cache are checked and handed over once, and known by a number to
// the calls that follow; release_caches ends that. check_caches raises where one of them is no
// longer what it was, for kernels that aren't the library's own. All serve any device.
#include <mutex>
#include <unordered_map>

#include "ops/caches.h"
#include "ops/registration.h"
#include "ops/string_argument.h"

namespace adsc::ops {
namespace {

struct Kept {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Caches>> caches;
  int64_t last = 0;  // number given
};

// Never destroyed: when the process ends, torch may be gone before its tensors.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

int64_t keep_caches(const std::vector<Tensor>& caches, int64_t num_layers,
                    const StringArgument& cache_layout) {
  auto found = std::make_shared<const Caches>(caches_of(caches, num_layers, cache_layout));
  const std::lock_guard lock(kept().mutex);
  kept().caches.emplace(++kept().last, std::move(found));
  return kept().last;
}

void release_caches(int64_t number) {
  std::shared_ptr<const Caches> released;  // outlives the lock: tensors may take their time
  const std::lock_guard lock(kept().mutex);
  const auto at = kept().caches.find(number);
  if (at == kept().caches.end()) return;
  released = std::move(at->second);
  kept().caches.erase(at);
}

void check_caches(int64_t number) { kept_caches(number); }

STABLE_TORCH_LIBRARY_FRAGMENT(ADSC_NAMESPACE, m) {
  m.def("keep_caches(Tensor[] caches, int num_layers, str cache_layout) -> int");
  m.def("check_caches(int number) -> ()");
  m.def("release_caches(int number) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ADSC_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("keep_caches", TORCH_BOX(&keep_caches));
  m.impl("check_caches", TORCH_BOX(&check_caches));
  m.impl("release_caches", TORCH_BOX(&release_caches));
}

}  // namespace

std::shared_ptr<const Caches> kept_caches(int64_t number) {
  std::shared_ptr<const Caches> caches;
  {
    const std::lock_guard lock(kept().mutex);
    const auto at = kept().caches.find(number);
    check(at != kept().caches.end(), "caches: expected what keep_caches returned, got ", number);
    caches = at->second;
  }
  for (size_t i = 0; i < caches->tensors.size(); ++i) {
    check(place_of(caches->tensors[i], i) == caches->places[i], "caches[", i,
          "]: expected a tensor that hasn't changed since it is kept, got shape ",
          Shape{caches->tensors[i]});
  }
  return caches;
}

}  // namespace adsc::ops
