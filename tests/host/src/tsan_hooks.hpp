#pragma once
// The functions that g++ -fsanitize=thread calls before every load and store, replacing libtsan: each access of a kernel is
// checked against the shadow of shared memory, or against the memory that the launch may access.

namespace exl_host {
inline void hook(const void* p, size_t num_bytes, bool write, void* site) {
  if (!in_kernel) return;
  ++stats.accesses;
  if (in_shared_arena(p)) shadow_access(current, p, num_bytes, write ? Access::kWrite : Access::kRead, site);
  else check_other(p, num_bytes, write, site);
}
}  // namespace exl_host

extern "C" {
#define EXL_HOOKS(n)                                                      \
  void __tsan_read##n(void* p) { hook(p, n, false, EXL_SITE); }           \
  void __tsan_write##n(void* p) { hook(p, n, true, EXL_SITE); }           \
  void __tsan_unaligned_read##n(void* p) { hook(p, n, false, EXL_SITE); } \
  void __tsan_unaligned_write##n(void* p) { hook(p, n, true, EXL_SITE); }
EXL_HOOKS(1)
EXL_HOOKS(2) EXL_HOOKS(4) EXL_HOOKS(8) EXL_HOOKS(16)
#undef EXL_HOOKS
    void __tsan_read_range(void* p, size_t n) {
  hook(p, n, false, EXL_SITE);
}
void __tsan_write_range(void* p, size_t n) { hook(p, n, true, EXL_SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
