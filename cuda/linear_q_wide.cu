// linear_q_wide: y = x W^T (+ bias) for 9 to 64 tokens, with the weights of linear_q.cu and, per row, the same bits.
//
//   codes, qparams, group_units   as in linear_q.cu
//   x          f16 [num_tokens, x_stride]; x_stride and K are multiples of 8
//   x_scale    f32 [num_tokens, 8], or null: factor of a token's sum over each slice, which undoes the scaling by
//              round_activations.cu of bf16 into f16's range
//   partial    f32 [EXL_SPREAD][grid y][8 warps][kR][EXL_NT][32 lanes][4]: each block's sums; used if EXL_SPREAD > 1
//   arrived    u32 [grid y], zero before the first launch and after every launch
//   y, bias, sumsq_out, permuted, channel_map, scale   epilogue.cuh; `epilogue` and `out_type` name the kind
//
// Block: 8 warps of kR row tiles each; grid: (EXL_SPREAD, ceil(tiles / (8 kR))), so that the blocks that share rows run
// together and find each other's sums in L2. A block takes 8 / EXL_SPREAD slices of K; the last block to arrive adds the
// partial sums in tree order (the counter is the only atomic). Each warp has its own ring of weights. All warps share the
// activations, `x_stages` stages at a time; with two buffers the next ones are copied during the multiplication. Slices are
// added in the order of a binary counter (close_slice). Shared bytes: 8 rings, then
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
constexpr int kChunks = kStageK / 8;                    // 16-byte chunks per token and stage
constexpr int kRowsPerPass = kThreads / kChunks, kPasses = kRows / kRowsPerPass;

// The part of the activations that one thread copies: chunk tid % kChunks of every kRowsPerPass-th row, in each stage.
// Shared memory holds [stages][kRows][kStageK] halves.
struct InputCopy {
  const half* src;       // stage 0
  half* dst;
  size_t pass_stride;
  int passes;            // number of this thread's rows that are real tokens
  u32 tail_bytes;        // bytes of the chunk in the last stage of K: 16, or 0 beyond K

  EXL_DEVICE void start(half* s_x, const half* x, int x_stride, int num_tokens, int K, int num_stages, int tid) {
    const int chunk = tid % kChunks, row = tid / kChunks;
    src = x + static_cast<size_t>(row) * x_stride + chunk * 8;
    dst = s_x + row * kStageK + swizzled_chunk(chunk, row) * 8;   // kRowsPerPass is even: one swizzle for all passes
    pass_stride = static_cast<size_t>(kRowsPerPass) * x_stride;
    passes = row < num_tokens ? (num_tokens - row + kRowsPerPass - 1) / kRowsPerPass : 0;
    tail_bytes = (num_stages - 1) * kStageK + chunk * 8 < K ? 16 : 0;
  }
  // Fills rows past the last token with zeros; once is enough, as no copy writes them.
  EXL_DEVICE void clear(int stages) {
    for (int s = 0; s < stages; ++s) {
      EXL_UNROLL
      for (int i = 0; i < kPasses; ++i)
        if (i >= passes) *reinterpret_cast<uint4*>(dst + (s * kRows + i * kRowsPerPass) * kStageK) = make_uint4(0, 0, 0, 0);
    }
  }
  // Copies stages [start, stop) of K to shared memory, from its stage `at` on.
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

// A chunk: the stages [start, stop) whose activations are in shared memory together, at most x_stages and of one slice.
struct Chunks {
  int start, stop;
  int slice, num_stages, x_stages;

  EXL_DEVICE Chunks(int slice0, int first, int stages, int most) : start(first), stop(first), slice(slice0), num_stages(stages), x_stages(most) {
    find_stop(num_stages);
  }
  EXL_DEVICE void next(int last) {   // after the last chunk: empty
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
// Adds slice s in tree order, as a binary counter carries: for each trailing 1 bit of s, acc takes the pending sum of that
// level; acc is then left pending at the first 0 bit. After the last slice acc holds the root. The levels are three
// arrays, not one indexed array, because an index would send them to local memory.
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
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, g = lane / 4, t = lane % 4;
  // Known to be one number for all lanes it saves registers where sums of several slices wait, and costs some elsewhere.
  const int warp = kSlicesHere > 1 ? __shfl_sync(kAllLanes, tid / 32, 0) : tid / 32;
  const int num_stages = (K + kStageK - 1) / kStageK;
  const int slice0 = static_cast<int>(blockIdx.x) * kSlicesHere;
  const int first = slice_start(slice0, num_stages), last = slice_start(slice0 + kSlicesHere, num_stages);
  const int tile0 = (static_cast<int>(blockIdx.y) * kWarps + warp) * kR;

  Weights weights;
  weights.start(smem, warp, lane, {codes, qparams, num_tiles, num_stages, num_blocks, group_units}, tile0, first, last);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();   // only after this may results of earlier kernels be read

  half* s_x = reinterpret_cast<half*>(smem + kWarps * Ring::kWarpBytes);
  InputCopy inputs;
  inputs.start(s_x, x, x_stride, num_tokens, K, num_stages, tid);
  inputs.clear(x_stages * kBuffers);
  const int offset0 = g * kStageK + swizzled_chunk(t, g) * 8, offset1 = g * kStageK + swizzled_chunk(4 + t, g) * 8;

  Chunks chunks(slice0, first, num_stages, x_stages);
  Sums one, two, four, acc = {};
  int buffer = 0, before = 0;   // before: stages (= commit groups) since the pending copy of activations began
  if (kBuffers == 2) inputs.fetch(0, chunks.start, chunks.stop, num_stages);
  cp_async_commit_group();
  for (int slice = 0; slice < kSlicesHere; ++slice) {
    const int slice_stop = slice_start(slice0 + slice + 1, num_stages);
    while (chunks.start < slice_stop) {
      const int start = chunks.start, stop = chunks.stop;
      weights.ring.turn_to(start - first);
      chunks.next(last);
      if constexpr (kBuffers == 2) {
        if (before >= kAhead) cp_async_wait_group<kAhead - 1>();   // the activations' group is older than those left pending
        else cp_async_wait_group<0>();
        before = stop - start;
        __syncthreads();   // these activations are visible to all warps, and all have read the other buffer
        inputs.fetch((1 - buffer) * x_stages, chunks.start, chunks.stop, num_stages);
      } else {
        __syncthreads();   // all warps have read the previous activations
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
    const size_t spread_stride = static_cast<size_t>(gridDim.y) * kThreads * kR * kNT;   // in float4
    float4* mine = reinterpret_cast<float4*>(partial) + (static_cast<size_t>(blockIdx.y) * kWarps + warp) * kR * kNT * 32 + lane;
    EXL_UNROLL
    for (int r = 0; r < kR; ++r)
      EXL_UNROLL
      for (int n = 0; n < kNT; ++n)
        mine[blockIdx.x * spread_stride + (r * kNT + n) * 32] = make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]);
    __threadfence();       // the sums must be visible to all blocks before this block counts as arrived
    __syncthreads();
    u32* s_before = reinterpret_cast<u32*>(smem);
    if (tid == 0) *s_before = atomicInc(arrived + blockIdx.y, kSpread - 1);   // the last block resets the counter to 0
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
