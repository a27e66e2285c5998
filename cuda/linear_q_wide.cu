// linear_q_wide: y = x W (+ bias) for 9 to 64 tokens, the same weights and the same bits a row as linear_q.cu.
//
//   codes, qparams, group_units   as in linear_q.cu
//   x          f16 [num_tokens, x_stride]; stride and K: multiples of 8
//   x_scale    f32 [num_tokens, 8], or null: what a token's sum over a slice is multiplied by (round_activations.cu
//              brought bf16 into f16's range)
//   partial    f32 [EXL_SPREAD][grid y][8 warps][kR][EXL_NT][32 lanes][4]; EXL_SPREAD > 1: sums of slices on their way
//   arrived    u32 [grid y], zero before the first launch and after every launch
//   y, bias, sumsq_out, permuted, channel_map, scale   epilogue.cuh; `epilogue` and `out_type` name the kind
//
// Block: 8 warps of kR row tiles each; grid: (EXL_SPREAD, ceil(tiles / (8 kR))), so that the blocks that share rows run
// together and find each other's sums in L2. Block x takes 8 / EXL_SPREAD slices of K; the last one to arrive adds the
// partial sums in tree order (the counter is the only atomic). Weights come through a ring a warp; activations
// `x_stages` stages at a time, shared by all warps, in one buffer or in two: then the next ones are on their way
// meanwhile. Slices add up as a binary counter carries. Shared bytes: 8 rings, then
// EXL_BUFFERS * x_stages * 8 * EXL_NT * kStageK * 2; see exl/layout/linear_config.py.
//
// Macros: linear_core.cuh; EXL_NT 2|4|8: tokens / 8; EXL_SPREAD 1|2|4|8; EXL_BUFFERS 1|2; EXL_MIN_BLOCKS.
// Architectures: sm_75 and up. Tests: tests/kernels/test_linear.py
#include <exl/epilogue.cuh>
#include <exl/linear_core.cuh>
#include <exl/swizzle.cuh>

constexpr int kWarps = 8, kThreads = 256, kNT = EXL_NT, kRows = 8 * kNT, kSpread = EXL_SPREAD, kBuffers = EXL_BUFFERS;
constexpr int kSlicesHere = kSlices / kSpread;
constexpr int kLevels = kSlicesHere == 8 ? 3 : kSlicesHere == 4 ? 2 : kSlicesHere == 2 ? 1 : 0;
constexpr int kChunks = kStageK / 8;                    // of 16 bytes, a token and stage
constexpr int kRowsPerPass = kThreads / kChunks, kPasses = kRows / kRowsPerPass;

// One thread's share of the activations: chunk `tid % kChunks` of every kRowsPerPass-th row of each stage. Shared memory
// holds [stages][kRows][kStageK] halves.
struct InputCopy {
  const half* src;       // stage 0
  half* dst;
  size_t pass_stride;
  int passes;            // that hold real rows
  u32 tail_bytes;        // of its chunk in the last stage of K: 16 or none

  EXL_DEVICE void start(half* s_x, const half* x, int x_stride, int num_tokens, int K, int num_stages, int tid) {
    const int chunk = tid % kChunks, row = tid / kChunks;
    src = x + static_cast<size_t>(row) * x_stride + chunk * 8;
    dst = s_x + row * kStageK + swizzled_chunk(chunk, row) * 8;   // kRowsPerPass is even: one swizzle for all passes
    pass_stride = static_cast<size_t>(kRowsPerPass) * x_stride;
    passes = row < num_tokens ? (num_tokens - row + kRowsPerPass - 1) / kRowsPerPass : 0;
    tail_bytes = (num_stages - 1) * kStageK + chunk * 8 < K ? 16 : 0;
  }
  // Rows past the end: zeros, once.
  EXL_DEVICE void clear(int stages) {
    for (int s = 0; s < stages; ++s) {
      EXL_UNROLL
      for (int i = 0; i < kPasses; ++i)
        if (i >= passes) *reinterpret_cast<uint4*>(dst + (s * kRows + i * kRowsPerPass) * kStageK) = make_uint4(0, 0, 0, 0);
    }
  }
  // Stages [start, stop) of K to the stages from `at` on.
  EXL_DEVICE void fetch(int at, int start, int stop, int num_stages) {
    for (int s = start; s < stop; ++s) {
      const u32 bytes = s == num_stages - 1 ? tail_bytes : 16;
      EXL_UNROLL
      for (int i = 0; i < kPasses; ++i)
        if (i < passes)
          cp_async_16(dst + ((at + s - start) * kRows + i * kRowsPerPass) * kStageK,
                      src + i * pass_stride + static_cast<size_t>(s) * kStageK, bytes);
    }
  }
};

// The stages whose activations are in shared memory together: x_stages at most, of one slice.
struct Chunks {
  int start, stop;
  int slice, num_stages, x_stages;

  EXL_DEVICE Chunks(int slice0, int first, int stages, int most) : start(first), stop(first), slice(slice0), num_stages(stages), x_stages(most) {
    find_stop(num_stages);
  }
  EXL_DEVICE void next(int last) {   // past the last one: empty
    start = stop;
    find_stop(last);
  }
  EXL_DEVICE void find_stop(int last) {
    while (start < last && slice_start(slice + 1, num_stages) <= start) ++slice;
    const int border = slice_start(slice + 1, num_stages);
    stop = start >= last ? start : start + x_stages < border ? start + x_stages : border;
  }
};

using Sums = float[kR][kNT][4];

EXL_DEVICE void put(Sums& pending, Sums& acc) {
  EXL_UNROLL
  for (int r = 0; r < kR; ++r)
    EXL_UNROLL
    for (int n = 0; n < kNT; ++n)
      EXL_UNROLL
      for (int e = 0; e < 4; ++e) { pending[r][n][e] = acc[r][n][e]; acc[r][n][e] = 0.0f; }
}
EXL_DEVICE void take(const Sums& pending, Sums& acc) {
  EXL_UNROLL
  for (int r = 0; r < kR; ++r)
    EXL_UNROLL
    for (int n = 0; n < kNT; ++n)
      EXL_UNROLL
      for (int e = 0; e < 4; ++e) acc[r][n][e] = pending[r][n][e] + acc[r][n][e];
}
// A warp's sums as a binary counter: slice s meets what is pending on each level where s has a 1. The last slice's
// sum, the root of the tree, stays in acc. Three arrays, not one of three: an index would send them to local memory.
EXL_DEVICE void close_slice(Sums& one, Sums& two, Sums& four, Sums& acc, int s) {
  if (kLevels < 1) return;
  if ((s & 1) == 0) return put(one, acc);
  take(one, acc);
  if (kLevels < 2) return;
  if ((s & 2) == 0) return put(two, acc);
  take(two, acc);
  if (kLevels < 3) return;
  if ((s & 4) == 0) return put(four, acc);
  take(four, acc);
}

EXL_DEVICE void scale_slice(Sums& acc, const float* x_scale, int slice, int num_tokens, int t) {
  EXL_UNROLL
  for (int n = 0; n < kNT; ++n) {
    EXL_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int token = n * 8 + 2 * t + e;
      const float scale = token < num_tokens ? x_scale[token * kSlices + slice] : 0.0f;
      EXL_UNROLL
      for (int r = 0; r < kR; ++r) { acc[r][n][e] *= scale; acc[r][n][e + 2] *= scale; }
    }
  }
}

EXL_KERNEL(linear_q_wide, 256, EXL_MIN_BLOCKS)
(const u32* __restrict__ codes, const u8* __restrict__ qparams, const float* __restrict__ bias, const half* x, const float* x_scale, void* y,
 float* sumsq_out, float* permuted, const i32* __restrict__ channel_map, float* partial, u32* arrived, int K, int N,
 int num_tiles, int num_blocks, int group_units, int num_tokens, int x_stride, int x_stages, int epilogue, int out_type,
 int y_stride, float scale) {
  EXL_DYNAMIC_SMEM(u8, smem);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  const int num_stages = (K + kStageK - 1) / kStageK;
  const int slice0 = static_cast<int>(blockIdx.x) * kSlicesHere;
  const int first = slice_start(slice0, num_stages), last = slice_start(slice0 + kSlicesHere, num_stages);
  const int tile0 = (static_cast<int>(blockIdx.y) * kWarps + warp) * kR;

  Weights weights;
  weights.start(smem, warp, lane, {codes, qparams, num_tiles, num_stages, num_blocks, group_units}, tile0, first, last);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();   // from here on: what the kernels before this one wrote

  half* s_x = reinterpret_cast<half*>(smem + kWarps * Ring::kWarpBytes);
  InputCopy inputs;
  inputs.start(s_x, x, x_stride, num_tokens, K, num_stages, tid);
  inputs.clear(x_stages * kBuffers);
  const int offset0 = g * kStageK + swizzled_chunk(t, g) * 8, offset1 = g * kStageK + swizzled_chunk(4 + t, g) * 8;

  Chunks chunks(slice0, first, num_stages, x_stages);
  Sums one, two, four, acc = {};
  int buffer = 0, before = 0;   // stages since the copies that are wanted next
  if (kBuffers == 2) inputs.fetch(0, chunks.start, chunks.stop, num_stages);
  cp_async_commit_group();
  for (int slice = 0; slice < kSlicesHere; ++slice) {
    const int slice_stop = slice_start(slice0 + slice + 1, num_stages);
    while (chunks.start < slice_stop) {
      const int start = chunks.start, stop = chunks.stop;
      weights.ring.turn_to(start - first);
      chunks.next(last);
      if constexpr (kBuffers == 2) {
        if (before >= kAhead) cp_async_wait_group<kAhead - 1>();   // they are older than the weights on their way
        else cp_async_wait_group<0>();
        before = stop - start;
        __syncthreads();   // these activations are there for all, and all have read those of the other buffer
        inputs.fetch((1 - buffer) * x_stages, chunks.start, chunks.stop, num_stages);
      } else {
        __syncthreads();   // all have read the ones before
        inputs.fetch(0, start, stop, num_stages);
        cp_async_commit_group();
        cp_async_wait_group<0>();
        __syncthreads();
      }
      const half* s_now = s_x + buffer * x_stages * kRows * kStageK;
      weights.multiply<kNT>(acc, start, stop, s_now + offset0, s_now + offset1, 8 * kStageK, kRows * kStageK);
      buffer = kBuffers - 1 - buffer;
    }
    if (x_scale != nullptr) scale_slice(acc, x_scale, slice0 + slice, num_tokens, t);
    close_slice(one, two, four, acc, slice);
  }

  const Output out{y, bias, sumsq_out, permuted, channel_map, epilogue, out_type, N, num_tokens, y_stride, scale};
  if constexpr (kSpread == 1) {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      if (tile0 + r >= num_tiles) break;
      EXL_UNROLL
      for (int n = 0; n < kNT; ++n) finish_tile(acc[r][n], out, tile0 + r, num_tiles, n * 8, lane);
    }
  } else {
    const size_t spread_stride = static_cast<size_t>(gridDim.y) * kThreads * kR * kNT;   // of 16 bytes
    float4* mine = reinterpret_cast<float4*>(partial) + (static_cast<size_t>(blockIdx.y) * kWarps + warp) * kR * kNT * 32 + lane;
    EXL_UNROLL
    for (int r = 0; r < kR; ++r)
      EXL_UNROLL
      for (int n = 0; n < kNT; ++n)
        mine[blockIdx.x * spread_stride + (r * kNT + n) * 32] = make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]);
    __threadfence();       // the sums are there for all before this block counts as arrived
    __syncthreads();
    u32* s_before = reinterpret_cast<u32*>(smem);
    if (tid == 0) *s_before = atomicInc(arrived + blockIdx.y, kSpread - 1);   // the last one puts the counter back to 0
    __syncthreads();
    if (*s_before != kSpread - 1) return;
    __threadfence();
    const int tiles_here = num_tiles - tile0 < kR ? num_tiles - tile0 : kR, eights = (num_tokens + 7) / 8;
    for (int r = 0; r < tiles_here; ++r) {
      for (int n = 0; n < eights; ++n) {
        float4 v[kSpread];
        EXL_UNROLL
        for (int s = 0; s < kSpread; ++s) v[s] = __ldcg(mine + s * spread_stride + (r * kNT + n) * 32);
        const float4 root = tree_sum(v);
        float sum[4] = {root.x, root.y, root.z, root.w};
        finish_tile(sum, out, tile0 + r, num_tiles, n * 8, lane);
      }
    }
  }
}
