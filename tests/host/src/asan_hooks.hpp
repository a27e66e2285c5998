#pragma once
// Errors that g++ -fsanitize=address would report through libasan end the launch instead, naming the lane that made
// the access. libasan keeps the shadow memory and does the poisoning.

namespace exl_host {
inline void fail_address(uintptr_t at, size_t num_bytes, bool write, void* site) {
  const char* what = write ? "write" : "read";
  const void* p = reinterpret_cast<const void*>(at);
  if (in_shared_arena(p)) shared_offset(p, num_bytes, write, site);
  for (uint32_t i = 0; i < kMaxLanes; ++i) {
    if (at - reinterpret_cast<uintptr_t>(lanes[i].fiber.stack) >= kStackBytes) continue;
    char name[128] = "";
    void* start = nullptr;
    size_t bytes = 0;
    __asan_locate_address(const_cast<void*>(p), name, sizeof name, &start, &bytes);
    fail(site, nullptr, "AddressSanitizer: %s of %zu bytes outside of a local variable%s%s, at {0}", what, num_bytes,
         *name ? " near " : "", name);
  }
  fail_global(at, num_bytes, write, site);
}
}  // namespace exl_host

extern "C" {
#define EXL_REPORT(n)                                                                                                 \
  void __asan_report_load##n##_noabort(void* p) { fail_address(reinterpret_cast<uintptr_t>(p), n, false, EXL_SITE); } \
  void __asan_report_store##n##_noabort(void* p) { fail_address(reinterpret_cast<uintptr_t>(p), n, true, EXL_SITE); }
EXL_REPORT(1)
EXL_REPORT(2) EXL_REPORT(4) EXL_REPORT(8) EXL_REPORT(16)
#undef EXL_REPORT
    void __asan_report_load_n_noabort(void* p, size_t n) {
  fail_address(reinterpret_cast<uintptr_t>(p), n, false, EXL_SITE);
}
void __asan_report_store_n_noabort(void* p, size_t n) {
  fail_address(reinterpret_cast<uintptr_t>(p), n, true, EXL_SITE);
}
}
