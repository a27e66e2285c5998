#pragma once
// State of the running block: one block at a time, on one thread. Everything is plain static data of this shared library.
#include <exl_host/runtime.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <vector>

#include "fiber.hpp"

namespace exl_host {

constexpr uint32_t kWarp = 32, kMaxLanes = 1024, kMaxWarps = kMaxLanes / kWarp;
constexpr size_t kMaxShared = 256 * 1024;   // more than any architecture has
constexpr size_t kSharedGuard = 64 * 1024;  // on both sides, to catch wrong indices
constexpr size_t kSharedAlign = 16;         // the alignment that CUDA promises
constexpr size_t kStackBytes = 256 * 1024;  // sanitizers make frames several times larger

enum class State : uint8_t { kReady, kCollective, kBarrier, kDone };
enum class Op : uint8_t { kSync, kShuffle, kVote, kMatch, kReduce, kMma, kLdmatrix, kMovmatrix };

struct Collective {  // a lane's operands for a warp-wide instruction, and its result
  uint32_t in[8];
  float c[4];
  const void* row;
  uint32_t out[4];
};

struct Copy {  // an asynchronous copy in flight
  uint8_t* dst;
  const uint8_t* src;
  uint32_t num_bytes, src_bytes, group;
  void* site;
  uint8_t data[16];  // the source's bytes at issue
};

struct Lane {
  Fiber fiber;
  ExlDim thread;
  State state;
  bool waited;  // passed griddepcontrol.wait, or a barrier after one that did
  int vote;
  void* site;  // code address at which the lane waits
  uint32_t waiting_mask;
  Collective collective;
  std::vector<Copy> copies;
  uint32_t open_group;  // group of the copies that are not committed yet
};

inline Lane lanes[kMaxLanes];
inline Fiber main_fiber;
inline uint32_t current = 0;  // the running lane
inline bool in_kernel = false;
inline uint32_t num_lanes = 0, num_warps = 0, num_done = 0;
inline uint32_t ready[kMaxWarps], exists[kMaxWarps], done[kMaxWarps];  // bit masks of lanes, per warp
inline uint32_t num_at_barrier = 0;
inline void* barrier_site = nullptr;
inline int barrier_result = 0;
inline const ExlLaunch* launch = nullptr;
inline ExlFault* fault_out = nullptr;
inline bool faulted = false;
inline ExlStats stats;
inline uint64_t random_state = 1;

struct Cell {  // the race detector's record of one byte of shared memory
  uint32_t write_epoch, write_clock, read_epoch, read_clock, read_mask;
  uint16_t writer, read_warp;
  uint8_t flags;
  void *write_site, *read_site;
};

// Large, so all libraries of a process share it: one test run loads hundreds of kernel variants.
struct Workspace {
  uint32_t epoch;  // never repeats, so that cells of earlier blocks read as "never written" without being cleared
  uint8_t* stacks;
  Cell cells[kMaxShared];
  alignas(256) uint8_t shared[kSharedGuard + kMaxShared + kSharedGuard];
};
inline Workspace* workspace = nullptr;

// The block's bytes start 16 bytes past a larger alignment, so that kernels that rely on a larger one fail.
inline uint8_t* shared_base = nullptr;

inline uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 2685821657736338717ull) >> 32);
}
inline uint32_t random_below(uint32_t n) {
  return static_cast<uint32_t>((static_cast<uint64_t>(random_bits()) * n) >> 32);
}
inline uint32_t random_lane(uint32_t set) {  // a lane of a non-empty set
  const uint32_t turn = random_bits() & 31;
  const uint32_t turned = turn ? (set >> turn) | (set << (32 - turn)) : set;
  return (static_cast<uint32_t>(__builtin_ctz(turned)) + turn) & 31;
}

// Ends the launch: records the fault of the running lane and does not return.
void fail(void* site, void* other, const char* format, ...) __attribute__((format(printf, 3, 4), noreturn));

}  // namespace exl_host
