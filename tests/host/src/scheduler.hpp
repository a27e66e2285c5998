#pragma once
// Chooses the lane that runs next: seeded random, so that no kernel passes by an order that hardware does not promise.
#include "memory.hpp"
#include "shadow.hpp"

namespace exl_host {

void clear_groups();

inline void enter(uint32_t lane) {
  current = lane;
  exl_thread_idx = &lanes[lane].thread;
  ready[lane / kWarp] &= ~(1u << (lane % kWarp));
}

// A ready lane, or -1. Stays with a warp for some steps: as on hardware, and not in lockstep.
inline int pick() {
  uint32_t warp = current / kWarp;
  if (!ready[warp] || (random_bits() & 7) == 0) {
    const uint32_t first = random_below(num_warps);
    for (uint32_t i = 0;; ++i) {
      if (i == num_warps) return -1;
      warp = (first + i) % num_warps;
      if (ready[warp]) break;
    }
  }
  return static_cast<int>(warp * kWarp + random_lane(ready[warp]));
}

inline void fail(void* site, void* other, const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(fault_out->message, sizeof fault_out->message, format, list);
  va_end(list);
  fault_out->site[0] = site;
  fault_out->site[1] = other;
  fault_out->block = exl_block_idx;
  fault_out->thread = lanes[current].thread;
  fault_out->warp = static_cast<int32_t>(current / kWarp);
  fault_out->lane = static_cast<int32_t>(current % kWarp);
  faulted = true;
  in_kernel = false;
  switch_fiber(lanes[current].fiber, main_fiber, true);
  __builtin_trap();
}

// Deadlock: no lane can run, and not all are done. Reports which lane waits for what.
inline void fail_stuck() {
  uint32_t at_barrier = 0, at_collective = 0;
  int barrier_lane = -1, collective_lane = -1;
  for (uint32_t i = 0; i < num_lanes; ++i) {
    if (lanes[i].state == State::kBarrier) {
      ++at_barrier;
      barrier_lane = static_cast<int>(i);
    }
    if (lanes[i].state == State::kCollective) {
      ++at_collective;
      collective_lane = static_cast<int>(i);
    }
  }
  if (barrier_lane >= 0) {
    current = static_cast<uint32_t>(barrier_lane);
    if (collective_lane >= 0)
      fail(lanes[barrier_lane].site, lanes[collective_lane].site,
           "divergent barrier: %u threads wait in __syncthreads at {0}, %u in a warp collective at {1}, %u have exited",
           at_barrier, at_collective, num_done);
    fail(lanes[barrier_lane].site, nullptr,
         "divergent barrier: %u threads wait in __syncthreads at {0}, %u have exited", at_barrier, num_done);
  }
  current = static_cast<uint32_t>(collective_lane);
  const Lane& lane = lanes[current];
  fail(lane.site, nullptr, "warp collective at {0} with mask 0x%08x never completes: not all of its lanes arrive",
       lane.waiting_mask);
}

// The running lane yields; returns when it is scheduled again.
inline void yield_lane(bool leaving) {
  const uint32_t self = current;
  const int next = pick();
  if (next < 0) {
    if (num_done == num_lanes) {
      switch_fiber(lanes[self].fiber, main_fiber, true);
      __builtin_trap();
    }
    fail_stuck();
  }
  enter(static_cast<uint32_t>(next));
  if (current == self) return;
  ++stats.switches;
  switch_fiber(lanes[self].fiber, lanes[current].fiber, leaving);
}

inline void wake(uint32_t lane) {
  lanes[lane].state = State::kReady;
  ready[lane / kWarp] |= 1u << (lane % kWarp);
}

inline void lane_main() {
#if defined(EXL_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!main_fiber.stack) {  // the process's first switch starts from the main stack
    main_fiber.stack = static_cast<uint8_t*>(const_cast<void*>(bottom));
    main_fiber.stack_bytes = bytes;
  }
#endif
  exl_host_call(launch->args);
  Lane& lane = lanes[current];
  lane.state = State::kDone;
  done[current / kWarp] |= 1u << (current % kWarp);
  ++num_done;
  yield_lane(true);
  __builtin_trap();
}

// Arrives at the block's barrier; the last lane to arrive opens it.
inline void block_barrier(void* site, int predicate, int kind) {
  Lane& lane = lanes[current];
  if (num_at_barrier && barrier_site != site)
    fail(site, barrier_site, "divergent barrier: this thread is in __syncthreads at {0}, another at {1}");
  barrier_site = site;
  lane.site = site;
  lane.vote = predicate != 0;
  lane.state = State::kBarrier;
  if (++num_at_barrier < num_lanes) {
    yield_lane(false);
    return;
  }
  int count = 0;
  bool waited = false;
  for (uint32_t i = 0; i < num_lanes; ++i) {
    count += lanes[i].vote;
    waited |= lanes[i].waited;
  }
  barrier_result = kind == 0 ? count : kind == 1 ? count == static_cast<int>(num_lanes) : count > 0;
  for (uint32_t i = 0; i < num_lanes; ++i) {
    lanes[i].waited = waited;
    if (i != current) wake(i);
  }
  lane.state = State::kReady;
  num_at_barrier = 0;
  shadow_block_barrier();
}

inline void run_block() {
  memset(shared_base, 0xff, launch->shared_bytes);  // NaN in every floating-point type
  shadow_begin_block();
  clear_groups();
  num_done = num_at_barrier = 0;
  for (uint32_t w = 0; w < num_warps; ++w) {
    const uint32_t count = num_lanes - w * kWarp;
    ready[w] = exists[w] = count >= kWarp ? ~0u : (1u << count) - 1;
    done[w] = 0;
  }
  for (uint32_t i = 0; i < num_lanes; ++i) {
    Lane& lane = lanes[i];
    lane.thread = {i % exl_block_dim.x, i / exl_block_dim.x % exl_block_dim.y, i / exl_block_dim.x / exl_block_dim.y};
    lane.state = State::kReady;
    lane.waited = !launch->dependent;
    lane.copies.clear();
    lane.open_group = 0;
    prepare(lane.fiber, lane_main);
  }
  current = random_below(num_lanes);
  enter(static_cast<uint32_t>(pick()));
  in_kernel = true;
  switch_fiber(main_fiber, lanes[current].fiber, false);
  in_kernel = false;
}

}  // namespace exl_host
