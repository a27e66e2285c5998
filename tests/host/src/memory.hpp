#pragma once
// The memory that a kernel may access: its block's shared memory, the ranges that the launch names, its own stack, and the
// constants of its own shared library.
#include <link.h>

#include "state.hpp"

namespace exl_host {

inline uintptr_t image_start = 0, image_stop = 0, stacks_start = 0, stacks_stop = 0;
inline uint32_t last_range = 0;

inline int find_image(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + part.p_vaddr, self = reinterpret_cast<uintptr_t>(&lanes);
    if (part.p_type != PT_LOAD || self < start || self >= start + part.p_memsz) continue;
    image_start = ~uintptr_t(0);
    for (int j = 0; j < info->dlpi_phnum; ++j) {
      const ElfW(Phdr) & p = info->dlpi_phdr[j];
      if (p.p_type != PT_LOAD) continue;
      if (info->dlpi_addr + p.p_vaddr < image_start) image_start = info->dlpi_addr + p.p_vaddr;
      if (info->dlpi_addr + p.p_vaddr + p.p_memsz > image_stop) image_stop = info->dlpi_addr + p.p_vaddr + p.p_memsz;
    }
    return 1;
  }
  return 0;
}

inline bool in_shared_arena(const void* p) {
  return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(workspace->shared) < sizeof workspace->shared;
}

// Byte offset into the block's shared memory; fails outside of the bytes that the launch requested.
inline size_t shared_offset(const void* p, size_t num_bytes, bool write, void* site) {
  const intptr_t offset = static_cast<const uint8_t*>(p) - shared_base;
  if (offset < 0 || offset + num_bytes > launch->shared_bytes)
    fail(site, nullptr, "shared memory out of bounds: %s of %zu bytes at byte %zd, the launch has %llu bytes, at {0}",
         write ? "write" : "read", num_bytes, static_cast<ssize_t>(offset),
         static_cast<unsigned long long>(launch->shared_bytes));
  return static_cast<size_t>(offset);
}

inline void fail_global(uintptr_t at, size_t num_bytes, bool write, void* site) {
  const char* what = write ? "write" : "read";
  const ExlRange* nearest = nullptr;
  uintptr_t distance = ~uintptr_t(0);
  for (uint32_t i = 0; i < launch->num_ranges; ++i) {
    const ExlRange& r = launch->ranges[i];
    const uintptr_t d = at < r.start ? r.start - at : at - r.start < r.num_bytes ? 0 : at - r.start - r.num_bytes;
    if (d < distance) {
      distance = d;
      nearest = &r;
    }
  }
  if (!nearest)
    fail(site, nullptr, "global memory out of bounds: %s of %zu bytes, the launch has no buffers, at {0}", what,
         num_bytes);
  fail(site, nullptr,
       "global memory out of bounds: %s of %zu bytes at byte %lld of argument %d, which has %llu bytes, at {0}", what,
       num_bytes, static_cast<long long>(at - nearest->start), nearest->arg,
       static_cast<unsigned long long>(nearest->num_bytes));
}

inline void check_global(const void* p, size_t num_bytes, bool write, void* site) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const uint32_t count = launch->num_ranges;
  const ExlRange* found = nullptr;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t j = (last_range + i) % count;
    const ExlRange& r = launch->ranges[j];
    if (at - r.start >= r.num_bytes || r.num_bytes - (at - r.start) < num_bytes) continue;
    found = &r;
    if (write && !r.writable) continue;
    last_range = j;
    break;
  }
  if (!found) fail_global(at, num_bytes, write, site);
  const ExlRange& r = launch->ranges[last_range];
  const bool inside = at - r.start < r.num_bytes && r.num_bytes - (at - r.start) >= num_bytes;
  if (!inside || (write && !r.writable))
    fail(site, nullptr, "write to argument %d, which the kernel declares const, at {0}", found->arg);
  if (!lanes[current].waited && !r.early)
    fail(site, nullptr, "%s of argument %d before griddepcontrol.wait, at {0}: an earlier launch of the chain %s it",
         write ? "write" : "read", r.arg, write ? "may still use" : "writes");
}

// Checks any access, by instrumented code or by an instruction that the runtime executes.
inline void check_other(const void* p, size_t num_bytes, bool write, void* site) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at - stacks_start < stacks_stop - stacks_start) {
    const uintptr_t own = reinterpret_cast<uintptr_t>(lanes[current].fiber.stack);
    if (at - own >= kStackBytes)
      fail(site, nullptr, "%s of another thread's local memory, at {0}", write ? "write" : "read");
    return;
  }
  if (at - image_start < image_stop - image_start) return;
  check_global(p, num_bytes, write, site);
}

}  // namespace exl_host
