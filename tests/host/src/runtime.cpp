// The shim's runtime: compiled once per build and linked to every kernel. Never instrumented itself.
#include "collectives.hpp"

using namespace exl_host;

#define EXL_SITE __builtin_return_address(0)

extern "C" {

const ExlDim* exl_thread_idx = &lanes[0].thread;
ExlDim exl_block_idx, exl_block_dim, exl_grid_dim;

void* exl_shared_memory() { return shared_base; }
void exl_trap(const char* why) { fail(EXL_SITE, nullptr, "%s at {0}", why); }

// ---- barriers and warp-wide instructions ---------------------------------------------------------------------------

void exl_syncthreads() { block_barrier(EXL_SITE, 0, 0); }
int exl_syncthreads_vote(int predicate, int kind) {
  block_barrier(EXL_SITE, predicate, kind);
  return barrier_result;
}
void exl_syncwarp(uint32_t mask) { collective(Op::kSync, mask, 0, 0, EXL_SITE); }

uint64_t exl_shuffle(uint32_t mask, uint64_t value, int mode, uint32_t operand, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail(EXL_SITE, nullptr, "shuffle at {0}: width %d is not a power of two up to 32", width);
  Collective& mine = lanes[current].collective;
  memcpy(mine.in, &value, 8);
  mine.in[2] = operand;
  const uint32_t self = current;
  collective(Op::kShuffle, mask, static_cast<uint32_t>(mode), static_cast<uint32_t>(width), EXL_SITE);
  memcpy(&value, lanes[self].collective.out, 8);
  return value;
}
uint32_t exl_vote(uint32_t mask, int predicate, int kind) {
  Collective& mine = lanes[current].collective;
  mine.in[0] = predicate != 0;
  collective(Op::kVote, mask, static_cast<uint32_t>(kind), 0, EXL_SITE);
  return mine.out[0];
}
uint32_t exl_match(uint32_t mask, uint64_t value, int all, int* predicate) {
  Collective& mine = lanes[current].collective;
  memcpy(mine.in, &value, 8);
  collective(Op::kMatch, mask, static_cast<uint32_t>(all), 0, EXL_SITE);
  if (predicate) *predicate = static_cast<int>(mine.out[1]);
  return mine.out[0];
}
uint32_t exl_reduce(uint32_t mask, uint32_t value, int kind) {
  Collective& mine = lanes[current].collective;
  mine.in[0] = value;
  collective(Op::kReduce, mask, static_cast<uint32_t>(kind), 0, EXL_SITE);
  return mine.out[0];
}
// No architecture promises which lanes run together; a caller may rely only on its own bit.
uint32_t exl_activemask() { return 1u << (current % kWarp); }

ExlFrag exl_mma(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                float c2, float c3, int kind) {
  Collective& mine = lanes[current].collective;
  const uint32_t in[8] = {a0, a1, a2, a3, b0, b1, 0, 0};
  memcpy(mine.in, in, sizeof in);
  const float c[4] = {c0, c1, c2, c3};
  memcpy(mine.c, c, sizeof c);
  if (EXL_ARCH < 75 || (kind == 1 && EXL_ARCH < 80))
    fail(EXL_SITE, nullptr, "mma at {0} does not exist on sm_%d", EXL_ARCH);
  collective(Op::kMma, ~0u, static_cast<uint32_t>(kind), 0, EXL_SITE);
  ExlFrag d;
  memcpy(d.r, mine.out, sizeof d.r);
  return d;
}
ExlWords exl_ldmatrix(const void* row, int count, int transposed) {
  if (EXL_ARCH < 75) fail(EXL_SITE, nullptr, "ldmatrix at {0} does not exist on sm_%d", EXL_ARCH);
  Collective& mine = lanes[current].collective;
  mine.row = row;
  collective(Op::kLdmatrix, ~0u, static_cast<uint32_t>(transposed), static_cast<uint32_t>(count), EXL_SITE);
  ExlWords words;
  memcpy(words.r, mine.out, sizeof words.r);
  return words;
}
uint32_t exl_movmatrix(uint32_t a) {
  if (EXL_ARCH < 75) fail(EXL_SITE, nullptr, "movmatrix at {0} does not exist on sm_%d", EXL_ARCH);
  Collective& mine = lanes[current].collective;
  mine.in[0] = a;
  collective(Op::kMovmatrix, ~0u, 0, 0, EXL_SITE);
  return mine.out[0];
}

// ---- asynchronous copies: stricter than hardware, bytes arrive only at the wait -------------------------------------

void exl_cp_async(void* dst, const void* src, uint32_t num_bytes, uint32_t src_bytes) {
  void* site = EXL_SITE;
  if (src_bytes > num_bytes) fail(site, nullptr, "cp.async at {0}: %u source bytes into %u", src_bytes, num_bytes);
  if (!in_shared_arena(dst)) fail(site, nullptr, "cp.async at {0}: the destination is not shared memory");
  if (in_shared_arena(src)) fail(site, nullptr, "cp.async at {0}: the source is shared memory");
  if ((reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) % num_bytes)
    fail(site, nullptr, "cp.async at {0}: addresses are not aligned to %u bytes", num_bytes);
  if (src_bytes) check_global(src, src_bytes, false, site);
  Copy copy = {static_cast<uint8_t*>(dst),
               static_cast<const uint8_t*>(src),
               num_bytes,
               src_bytes,
               lanes[current].open_group,
               site,
               {}};
  memcpy(copy.data, src, src_bytes);
  if (EXL_ARCH < 80) {  // no asynchronous copies: a plain copy
    shadow_access(current, dst, num_bytes, Access::kWrite, site);
    memcpy(dst, copy.data, num_bytes);
    return;
  }
  shadow_access(current, dst, num_bytes, Access::kIssue, site);
  memset(dst, 0xff, num_bytes);
  lanes[current].copies.push_back(copy);
}
void exl_cp_async_commit() { ++lanes[current].open_group; }
void exl_cp_async_wait(int pending) {
  Lane& lane = lanes[current];
  size_t landed = 0;
  for (const Copy& copy : lane.copies) {
    if (copy.group + static_cast<uint32_t>(pending) >= lane.open_group) break;
    if (memcmp(copy.data, copy.src, copy.src_bytes))
      fail(EXL_SITE, copy.site, "cp.async: the source of the copy issued at {1} changed before the wait at {0}");
    shadow_access(current, copy.dst, copy.num_bytes, Access::kLand, EXL_SITE);
    memcpy(copy.dst, copy.data, copy.num_bytes);
    ++landed;
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<ptrdiff_t>(landed));
}

// ---- the rest ------------------------------------------------------------------------------------------------------

void exl_griddepcontrol_wait() { lanes[current].waited = true; }
void exl_griddepcontrol_launch() {}

uint64_t exl_atomic(void* p, uint64_t value, uint64_t compare, int num_bytes, int kind) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(num_bytes))
    fail(EXL_SITE, nullptr, "atomic at {0}: the address is not aligned to %d bytes", num_bytes);
  checked_access(current, p, static_cast<size_t>(num_bytes), Access::kAtomic, EXL_SITE);
  uint64_t old = 0, next = 0;
  memcpy(&old, p, static_cast<size_t>(num_bytes));
  const int64_t so = num_bytes == 4 ? static_cast<int32_t>(old) : static_cast<int64_t>(old);
  const int64_t sv = num_bytes == 4 ? static_cast<int32_t>(value) : static_cast<int64_t>(value);
  switch (kind) {
    case 0: next = old + value; break;
    case 1: next = value; break;
    case 2: next = sv < so ? value : old; break;
    case 3: next = value < old ? value : old; break;
    case 4: next = sv > so ? value : old; break;
    case 5: next = value > old ? value : old; break;
    case 6: next = old & value; break;
    case 7: next = old | value; break;
    case 8: next = old ^ value; break;
    case 9: next = old >= value ? 0 : old + 1; break;
    case 10: next = old == 0 || old > value ? value : old - 1; break;
    default: next = old == compare ? value : old;
  }
  memcpy(p, &next, static_cast<size_t>(num_bytes));
  return old;
}

void exl_access(const void* p, size_t num_bytes, int is_write) {
  if (num_bytes) checked_access(current, p, num_bytes, is_write ? Access::kWrite : Access::kRead, EXL_SITE);
}

// ---- called by Python ----------------------------------------------------------------------------------------------

const char* exl_host_build() {
#if defined(EXL_ASAN)
  return "asan";
#elif defined(EXL_RACE)
  return "race";
#else
  return "plain";
#endif
}
void exl_host_stats(ExlStats* out) { *out = stats; }

void* exl_host_workspace() {
  void* p =
      mmap(nullptr, sizeof(Workspace), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  Workspace* made = static_cast<Workspace*>(p);
  made->stacks = map_stacks(kMaxLanes, kStackBytes);
  return made->stacks ? made : nullptr;
}

int exl_host_launch(const ExlLaunch* request, ExlFault* fault) {
  launch = request;
  fault_out = fault;
  faulted = false;
  stats = ExlStats();
  if (!stacks_start) {
    const size_t stride = kStackBytes + static_cast<size_t>(sysconf(_SC_PAGESIZE));
    workspace = static_cast<Workspace*>(request->workspace);
    shared_base = workspace->shared + kSharedGuard + kSharedAlign;
    uint8_t* base = workspace->stacks;
    for (uint32_t i = 0; i < kMaxLanes; ++i) {
      lanes[i].fiber.stack = base + i * stride;
      lanes[i].fiber.stack_bytes = kStackBytes - i % 56 * 64;  // stack tops in different cache sets
    }
    stacks_start = reinterpret_cast<uintptr_t>(base);
    stacks_stop = stacks_start + kMaxLanes * stride;
    dl_iterate_phdr(find_image, nullptr);
  }
#if defined(EXL_ASAN)
  main_fiber.stack = nullptr;
  __asan_poison_memory_region(workspace->shared, sizeof workspace->shared);
  __asan_unpoison_memory_region(shared_base, request->shared_bytes);
#endif
  exl_grid_dim = request->grid;
  exl_block_dim = request->block;
  num_lanes = request->block.x * request->block.y * request->block.z;
  num_warps = (num_lanes + kWarp - 1) / kWarp;
  random_state = request->seed * 2 + 1;
  for (int i = 0; i < 8; ++i) random_bits();
  last_range = 0;
  const size_t num_blocks = static_cast<size_t>(request->grid.x) * request->grid.y * request->grid.z;
  std::vector<uint32_t> order(num_blocks);
  for (size_t i = 0; i < num_blocks; ++i) order[i] = static_cast<uint32_t>(i);
  for (size_t i = num_blocks; i > 1; --i) {
    const size_t j = random_below(static_cast<uint32_t>(i));
    const uint32_t swapped = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swapped;
  }
  for (size_t i = 0; i < num_blocks && !faulted; ++i) {
    exl_block_idx = {order[i] % request->grid.x, order[i] / request->grid.x % request->grid.y,
                     order[i] / request->grid.x / request->grid.y};
    run_block();
  }
#if defined(EXL_ASAN)
  __asan_unpoison_memory_region(workspace->shared, sizeof workspace->shared);
#endif
  return faulted;
}

}  // extern "C"

#if defined(EXL_RACE)
#include "tsan_hooks.hpp"
#endif
#if defined(EXL_ASAN)
#include "asan_hooks.hpp"
#endif
#include "ubsan_hooks.hpp"
