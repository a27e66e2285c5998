#pragma once
// Shared by the quantized linear kernels: the prefetch of weights and the product of one stage. linear_q and linear_q_wide
// issue the same instructions in the same order for a row, so its bits do not depend on which of them ran.
//
// Macros: tile.cuh; EXL_R: row tiles per warp; EXL_STAGES: depth of the ring.
#include <exl/half.cuh>
#include <exl/slices.cuh>
#include <exl/tile.cuh>

constexpr int kR = EXL_R, kStages = EXL_STAGES;
constexpr u32 kAllLanes = 0xffffffffu;

// acc += the product of one stage. codes: a lane's words. x0, x1: a lane's 16 bytes of the first and second 32 inputs of
// each 64, in token row g; the next 8 tokens lie `pitch8` halves further. Each group is summed in f32 on its own; the scale
// multiplies that sum.
template <int kNT>
EXL_DEVICE void multiply_stage(float (&acc)[kR][kNT][4], const u32 (&codes)[kR][kLoads * 4],
                               const QParams (&qparams)[kR], const half* x0, const half* x1, int pitch8) {
  FragC part[kR][kNT];
  Q::Zero zero[kR];
  EXL_UNROLL
  for (int b = 0; b < kStageK / 32; ++b) {
    uint4 x[kNT];
    EXL_UNROLL
    for (int n = 0; n < kNT; ++n) x[n] = *reinterpret_cast<const uint4*>((b % 2 ? x1 : x0) + n * pitch8 + b / 2 * 64);
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      EXL_UNROLL
      for (int half_k = 0; half_k < 2; ++half_k) {
        const int k = b * 32 + half_k * 16, unit = k / kUnitK;
        if (k % kUnitK == 0) {
          zero[r] = qparams[r].zero(unit);
          EXL_UNROLL
          for (int n = 0; n < kNT; ++n) part[r][n].r[0] = part[r][n].r[1] = part[r][n].r[2] = part[r][n].r[3] = 0.0f;
        }
        const FragA a = Q::fragment(codes[r], b / 2, b % 2 * 2 + half_k, zero[r]);
        EXL_UNROLL
        for (int n = 0; n < kNT; ++n) mma_m16n8k16(part[r][n], a, half_k ? FragB{{x[n].z, x[n].w}} : FragB{{x[n].x, x[n].y}});
        if ((k + 16) % kUnitK == 0) {
          const float2 scale = qparams[r].scale(unit);
          EXL_UNROLL
          for (int n = 0; n < kNT; ++n) {
            acc[r][n][0] = fmaf(scale.x, part[r][n].r[0], acc[r][n][0]);
            acc[r][n][1] = fmaf(scale.x, part[r][n].r[1], acc[r][n][1]);
            acc[r][n][2] = fmaf(scale.y, part[r][n].r[2], acc[r][n][2]);
            acc[r][n][3] = fmaf(scale.y, part[r][n].r[3], acc[r][n][3]);
          }
        }
      }
    }
  }
}

// Prefetches a warp's weights: kR row tiles, kStages - 1 stages ahead, in a ring in shared memory. A stage's codes, scales
// and zero points are in one copy group, so all have the same time to arrive. A lane reads only codes that it copied
// itself, but also scales and zero points that other lanes copied. __syncwarp makes those visible: the loop needs no block
// barrier.
template <bool kAsync> struct WeightRing {
  static constexpr int kCodeBytes = kR * kLoads * 512;                          // per stage and warp
  static constexpr int kChunkBytes = kBlockBytes % 16 == 0 ? 16 : 8;            // of one copy of scales and zero points
  static constexpr int kTileChunks = kBlocks * kBlockBytes / kChunkBytes, kChunks = kR * kTileChunks;
  static constexpr int kCopies = (kChunks + 31) / 32;                           // chunks that one lane copies, at most
  static constexpr int kSlotBytes = kCodeBytes + (kChunks * kChunkBytes + 15) / 16 * 16;
  static constexpr int kWarpBytes = kStages * kSlotBytes;                       // of shared memory

  const uint4* src[kR];           // this lane's bytes of the stage to fetch next
  BlockWalk walk[kCopies];        // at the chunks that this lane copies for its warp
  u8 *codes_at, *chunks_to;       // in slot 0: this lane's codes; the destination of its chunks
  const u8 *scales_at, *zeros_at; // in slot 0: scales and zero points of this lane's rows
  int slot[kStages];
  int left, chunks_left[kCopies]; // stages from src on; of chunk i the same number, or 0 if this lane has no chunk i
  int group_units;

  EXL_DEVICE void start(u8* smem, int warp, int lane, const TiledMatrix& m, int tile0, int stage, int last) {
    u8* base = smem + warp * kWarpBytes;
    codes_at = base + lane * 16;
    chunks_to = (kChunkBytes == 16 ? codes_at : base + lane * kChunkBytes) + kCodeBytes;
    scales_at = base + kCodeBytes + lane / 4 * kRowScales;
    zeros_at = base + kCodeBytes + 8 * kRowScales + lane / 4 * kRowZeros;
    group_units = m.group_units;
    left = last - stage;
    turn_to(0);
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) src[r] = m.codes_of(tile0 + r, stage) + lane;
    EXL_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      chunks_left[i] = lane + i * 32 < kChunks ? left : 0;
      const int chunk = lane + i * 32 < kChunks ? lane + i * 32 : kChunks - 1, in_tile = chunk % kTileChunks;
      walk[i].start(m, tile0 + chunk / kTileChunks, stage, in_tile / (kTileChunks / kBlocks));
      walk[i].block += in_tile % (kTileChunks / kBlocks) * kChunkBytes;
    }
  }
  // Rotates the slots so that slot[0] is that of stage `turn`, counted from the first.
  EXL_DEVICE void turn_to(int turn) {
    EXL_UNROLL
    for (int s = 0; s < kStages; ++s) slot[s] = (s + turn) % kStages * kSlotBytes;
  }
  // Starts the copies of the stage `ahead` stages after src, if there is one, to slot[to].
  EXL_DEVICE void fetch(int to, int ahead) {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r)
      EXL_UNROLL
      for (int i = 0; i < kLoads; ++i)
        if (ahead < left) cp_async_16(codes_at + slot[to] + (r * kLoads + i) * 512, src[r] + (ahead * kLoads + i) * 32);
    EXL_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      u8* chunk = chunks_to + slot[to] + i * 32 * kChunkBytes;
      const u8* from = walk[i].block + (kGroup == 0 ? 0 : ahead * kBlockBytes);
      if (ahead < chunks_left[i]) {
        if constexpr (kChunkBytes == 16) cp_async_16(chunk, from);
        else cp_async_8(chunk, from);
      }
      if (kGroup == 0) walk[i].step(group_units);
    }
  }
  EXL_DEVICE void take(u32 (&codes)[kR][kLoads * 4], QParams (&qparams)[kR], int from) const {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      EXL_UNROLL
      for (int i = 0; i < kLoads; ++i) read_words<16>(codes[r] + i * 4, codes_at + slot[from] + (r * kLoads + i) * 512);
      EXL_UNROLL
      for (int q = 0; q < kBlocks; ++q) {
        const int block = slot[from] + (r * kBlocks + q) * kBlockBytes;
        qparams[r].read(q, scales_at + block, zeros_at + block);
      }
    }
  }
  EXL_DEVICE void advance(int stages) {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) src[r] += stages * kLoads * 32;
    left -= stages;
    EXL_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      chunks_left[i] -= stages;
      if (kGroup != 0) walk[i].block += stages * kBlockBytes;   // kGroup == 0: fetch steps the walk
    }
  }
};

// Without asynchronous copies (below sm_80): prefetches one stage, into registers.
template <> struct WeightRing<false> {
  static constexpr int kWarpBytes = 0;

  const uint4* src[kR];
  BlockWalk walk[kR][kBlocks];
  u32 next[kR][kLoads * 4];
  QParams next_qparams[kR];
  int left, g, group_units;

  EXL_DEVICE void start(u8*, int, int lane, const TiledMatrix& m, int tile0, int stage, int last) {
    g = lane / 4;
    group_units = m.group_units;
    left = last - stage;
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      src[r] = m.codes_of(tile0 + r, stage) + lane;
      EXL_UNROLL
      for (int q = 0; q < kBlocks; ++q) walk[r][q].start(m, tile0 + r, stage, q);
    }
  }
  EXL_DEVICE void turn_to(int) {}
  EXL_DEVICE void fetch(int, int ahead) {
    if (ahead >= left) return;
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      EXL_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const uint4 v = ld_global_nc_u32x4(src[r] + (ahead * kLoads + i) * 32);
        next[r][i * 4] = v.x; next[r][i * 4 + 1] = v.y; next[r][i * 4 + 2] = v.z; next[r][i * 4 + 3] = v.w;
      }
      EXL_UNROLL
      for (int q = 0; q < kBlocks; ++q) {
        next_qparams[r].read_block(q, walk[r][q].block + (kGroup == 0 ? 0 : ahead * kBlockBytes), g);
        if (kGroup == 0) walk[r][q].step(group_units);
      }
    }
  }
  EXL_DEVICE void take(u32 (&codes)[kR][kLoads * 4], QParams (&qparams)[kR], int) const {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      EXL_UNROLL
      for (int w = 0; w < kLoads * 4; ++w) codes[r][w] = next[r][w];
      qparams[r] = next_qparams[r];
    }
  }
  EXL_DEVICE void advance(int stages) {
    left -= stages;
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      src[r] += stages * kLoads * 32;
      EXL_UNROLL
      for (int q = 0; q < kBlocks; ++q)
        if (kGroup != 0) walk[r][q].block += stages * kBlockBytes;
    }
  }
};
using Ring = WeightRing<kHasCpAsync>;
constexpr int kAhead = kHasCpAsync ? kStages - 1 : 1;   // stages in flight

// A warp's weights and the loop that multiplies them.
struct Weights {
  Ring ring;

  // Starts the first copies; touches no activations. [first, last): the stages of this warp or block.
  EXL_DEVICE void start(u8* smem, int warp, int lane, const TiledMatrix& m, int tile0, int first, int last) {
    ring.start(smem, warp, lane, m, tile0, first, last);
    EXL_UNROLL
    for (int s = 0; s < kAhead; ++s) {
      ring.fetch(s, s);
      cp_async_commit_group();
    }
    ring.advance(kAhead);
  }

  // acc += stages [start, stop) of K. x0, x1: see multiply_stage; the next stage lies x_pitch halves further.
  template <int kNT>
  EXL_DEVICE void multiply(float (&acc)[kR][kNT][4], int start, int stop, const half* x0, const half* x1, int pitch8,
                           int x_pitch) {
    for (int base = start; base < stop; base += kStages) {
      const int here = stop - base;
      EXL_UNROLL
      for (int s = 0; s < kStages; ++s) {
        if (s >= here) break;
        cp_async_wait_group<kAhead - 1>();   // this lane's copies of stage s have arrived
        if constexpr (kHasCpAsync) __syncwarp();   // so have every lane's, and all lanes have read the slot that is filled next
        u32 codes[kR][kLoads * 4];
        QParams qparams[kR];
        ring.take(codes, qparams, s);
        ring.fetch((s + kAhead) % kStages, s);
        cp_async_commit_group();
        multiply_stage<kNT>(acc, codes, qparams, x0 + s * x_pitch, x1 + s * x_pitch, pitch8);
      }
      ring.advance(here < kStages ? here : kStages);
      x0 += kStages * x_pitch;
      x1 += kStages * x_pitch;
    }
  }
};
