#pragma once
// Race detection on shared memory. Every byte remembers its last writer and its readers since; two accesses by
// different threads, one of them a write, must be ordered by a barrier: __syncthreads for any two threads of the block,
// __syncwarp for the lanes in its mask. Shuffles, votes, mma and ldmatrix order nothing.
//
// There are two clocks: the block's epoch, advanced by __syncthreads, and each warp's clock, advanced by its __syncwarp.
// `seen[w][i][l]`: accesses of lane l up to this clock are ordered before lane i, in warp w.
#include "memory.hpp"

namespace exl_host {

enum class Access : uint8_t { kRead, kWrite, kAtomic, kIssue, kLand };  // the last two: an asynchronous copy

#if !defined(EXL_RACE)
inline void shadow_begin_block() {}
inline void shadow_block_barrier() {}
inline void shadow_warp_barrier(uint32_t, uint32_t) {}
inline void shadow_access(uint32_t, const void* p, size_t num_bytes, Access kind, void* site) {
  shared_offset(p, num_bytes, kind != Access::kRead, site);
}
#else
enum : uint8_t { kWroteAtomic = 1, kInFlight = 2, kManyWarps = 4 };
inline uint32_t first_epoch = 1;
inline uint32_t clock_of[kMaxWarps];
inline uint32_t seen[kMaxWarps][kWarp][kWarp];

inline void shadow_begin_block() {
  first_epoch = ++workspace->epoch;
  for (uint32_t w = 0; w < num_warps; ++w) clock_of[w] = 1;
  memset(seen, 0, num_warps * sizeof seen[0]);
}
inline void shadow_block_barrier() { ++workspace->epoch; }
inline void shadow_warp_barrier(uint32_t warp, uint32_t mask) {
  uint32_t joined[kWarp] = {};
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    for (uint32_t l = 0; l < kWarp; ++l) joined[l] = joined[l] > seen[warp][i][l] ? joined[l] : seen[warp][i][l];
  }
  for (uint32_t i = 0; i < kWarp; ++i)
    if (mask >> i & 1) joined[i] = clock_of[warp];
  for (uint32_t i = 0; i < kWarp; ++i)
    if (mask >> i & 1) memcpy(seen[warp][i], joined, sizeof joined);
  ++clock_of[warp];
}

inline void fail_race(const char* what, size_t byte, uint32_t self, uint32_t other, void* site, void* other_site) {
  fail(site, other_site,
       "race on shared memory: %s at byte %zu by thread %u at {0}, against thread %u at {1}: no %s between", what, byte,
       self, other, self / kWarp == other / kWarp ? "__syncwarp or __syncthreads" : "__syncthreads");
}

// Whether a barrier separates `other`'s access, made in this epoch, from the present access of lane `self`.
inline bool ordered(uint32_t self, uint32_t other, uint32_t clock) {
  if (self == other) return true;
  return self / kWarp == other / kWarp && clock <= seen[self / kWarp][self % kWarp][other % kWarp];
}

inline void check_readers(const Cell& cell, uint32_t self, size_t byte, void* site) {
  const uint32_t warp = self / kWarp;
  if ((cell.flags & kManyWarps) || cell.read_warp != warp) {
    const uint32_t other = cell.read_warp * kWarp + static_cast<uint32_t>(__builtin_ctz(cell.read_mask));
    fail_race("write after read", byte, self, other, site, cell.read_site);
  }
  for (uint32_t rest = cell.read_mask; rest; rest &= rest - 1) {
    const uint32_t other = warp * kWarp + static_cast<uint32_t>(__builtin_ctz(rest));
    if (!ordered(self, other, cell.read_clock)) fail_race("write after read", byte, self, other, site, cell.read_site);
  }
}

inline void note_read(Cell& cell, uint32_t self, uint32_t epoch, void* site) {
  const uint32_t warp = self / kWarp, bit = 1u << (self % kWarp);
  if (cell.read_epoch != epoch) {
    cell.read_epoch = epoch;
    cell.read_mask = 0;
    cell.flags &= static_cast<uint8_t>(~kManyWarps);
  } else if (cell.read_warp != warp) {
    cell.flags |= kManyWarps;  // any write before the next __syncthreads races with one of them
    cell.read_mask = 0;
  } else if (cell.read_clock != clock_of[warp]) {
    // This lane replaces readers ordered before it. The others get the newest clock: maybe too late, never too early.
    for (uint32_t rest = cell.read_mask; rest; rest &= rest - 1) {
      const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(rest));
      if (cell.read_clock <= seen[warp][self % kWarp][lane]) cell.read_mask &= ~(1u << lane);
    }
  }
  cell.read_warp = static_cast<uint16_t>(warp);
  cell.read_mask |= bit;
  cell.read_clock = clock_of[warp];
  cell.read_site = site;
}

inline void shadow_access(uint32_t self, const void* p, size_t num_bytes, Access kind, void* site) {
  const bool write = kind != Access::kRead;
  const size_t start = shared_offset(p, num_bytes, write, site);
  const uint32_t epoch = workspace->epoch;
  for (size_t byte = start; byte < start + num_bytes; ++byte) {
    Cell& cell = workspace->cells[byte];
    const bool written = cell.write_epoch >= first_epoch;
    if (!written && (kind == Access::kRead || kind == Access::kAtomic))
      fail(site, nullptr, "read of shared memory that was never written, at byte %zu, at {0}", byte);
    if (written && (cell.flags & kInFlight) && kind != Access::kLand)
      fail(site, cell.write_site,
           "%s of shared memory at byte %zu at {0} while the asynchronous copy that thread %u issued at {1} "
           "is on its way: no cp_async_wait_group for it",
           write ? "write" : "read", byte, cell.writer);
    const bool both_atomic = kind == Access::kAtomic && (cell.flags & kWroteAtomic);
    if (cell.write_epoch == epoch && !both_atomic && !ordered(self, cell.writer, cell.write_clock))
      fail_race(write ? "write after write" : "read after write", byte, self, cell.writer, site, cell.write_site);
    if (!write) {
      note_read(cell, self, epoch, site);
      continue;
    }
    if (cell.read_epoch == epoch && cell.read_mask) check_readers(cell, self, byte, site);
    cell.write_epoch = epoch;
    cell.write_clock = clock_of[self / kWarp];
    cell.writer = static_cast<uint16_t>(self);
    cell.write_site = site;
    cell.flags = kind == Access::kAtomic ? kWroteAtomic : kind == Access::kIssue ? kInFlight : 0;
    cell.read_epoch = 0;
    cell.read_mask = 0;
  }
}
#endif

// Checks an access by an instruction that the runtime executes, or by an instrumented load or store.
inline void checked_access(uint32_t self, const void* p, size_t num_bytes, Access kind, void* site) {
  if (in_shared_arena(p)) shadow_access(self, p, num_bytes, kind, site);
  else check_other(p, num_bytes, kind != Access::kRead, site);
}

}  // namespace exl_host
