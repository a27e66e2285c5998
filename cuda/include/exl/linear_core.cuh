#pragma once
// What the linear kernels share: how K is cut into slices, how slices add up, and the product of one stage. Both
// kernels issue the same instructions in the same order for a row, so its bits do not depend on which one ran.
//
// Macros: tile.cuh; EXL_R row tiles a warp; EXL_STAGES depth of the ring.
#include <exl/half.cuh>
#include <exl/slices.cuh>
#include <exl/tile.cuh>

constexpr int kR = EXL_R, kStages = EXL_STAGES;
constexpr u32 kAllLanes = 0xffffffffu;

// acc += one stage of inputs. codes: a lane's words. x0, x1: a lane's 16 bytes of the first and second 32 inputs of
// each 64, in token row g; the next 8 tokens lie `pitch8` halves further. Groups add up in f32 on their own, and the
// scale meets their sum.
template <int kNT>
EXL_DEVICE void multiply_stage(float (&acc)[kR][kNT][4], const u32 (&codes)[kR][kLoads * 4], const Meta (&meta)[kR],
                               const half* x0, const half* x1, int pitch8) {
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
          zero[r] = Q::zero(kSymmetric ? symmetric_zero() : meta[r].zero[unit]);
          EXL_UNROLL
          for (int n = 0; n < kNT; ++n) part[r][n].r[0] = part[r][n].r[1] = part[r][n].r[2] = part[r][n].r[3] = 0.0f;
        }
        const FragA a = Q::fragment(codes[r], b / 2, b % 2 * 2 + half_k, zero[r]);
        EXL_UNROLL
        for (int n = 0; n < kNT; ++n) mma_m16n8k16(part[r][n], a, half_k ? FragB{{x[n].z, x[n].w}} : FragB{{x[n].x, x[n].y}});
        if ((k + 16) % kUnitK == 0) {
          const half2 scale = bits_half2(meta[r].scale[unit]);
          const float lo = __low2float(scale), hi = __high2float(scale);
          EXL_UNROLL
          for (int n = 0; n < kNT; ++n) {
            acc[r][n][0] = fmaf(lo, part[r][n].r[0], acc[r][n][0]);
            acc[r][n][1] = fmaf(lo, part[r][n].r[1], acc[r][n][1]);
            acc[r][n][2] = fmaf(hi, part[r][n].r[2], acc[r][n][2]);
            acc[r][n][3] = fmaf(hi, part[r][n].r[3], acc[r][n][3]);
          }
        }
      }
    }
  }
}

// A lane's own copies of its warp's weights: 16 bytes a load, kStages - 1 stages ahead, read by no other lane, so that
// the loop needs no barrier. sm_75 has no asynchronous copies: one stage ahead, in registers.
struct WeightRing {
  const uint4* src[kR];               // this lane's bytes of the stage to fetch next
  uint4* slot[kStages];
  u32 next[kHasCpAsync ? 1 : kR][kHasCpAsync ? 1 : kLoads * 4];

  static constexpr int kSlotLoads = kR * kLoads * 32;                                   // of 16 bytes, by a warp
  static constexpr int kWarpBytes = kHasCpAsync ? kStages * kSlotLoads * 16 : 0;        // of shared memory

  // slot[0] takes the stage that lies `turn` stages after the first.
  EXL_DEVICE void turn_to(u8* smem, int warp, int lane, int turn) {
    EXL_UNROLL
    for (int s = 0; s < kStages; ++s)
      slot[s] = reinterpret_cast<uint4*>(smem + warp * kWarpBytes) + (s + turn) % kStages * kSlotLoads + lane;
  }
  // Starts the copy of the stage that lies `ahead` stages after src.
  EXL_DEVICE void fetch(int to, int ahead) {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      EXL_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const uint4* from = src[r] + (ahead * kLoads + i) * 32;
        if constexpr (kHasCpAsync) {
          cp_async_16(slot[to] + (r * kLoads + i) * 32, from);
        } else {
          const uint4 v = ld_global_nc_u32x4(from);
          next[r][i * 4] = v.x; next[r][i * 4 + 1] = v.y; next[r][i * 4 + 2] = v.z; next[r][i * 4 + 3] = v.w;
        }
      }
    }
  }
  EXL_DEVICE void take(u32 (&codes)[kR][kLoads * 4], int from) const {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      EXL_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        if constexpr (kHasCpAsync) {
          const uint4 v = slot[from][(r * kLoads + i) * 32];
          codes[r][i * 4] = v.x; codes[r][i * 4 + 1] = v.y; codes[r][i * 4 + 2] = v.z; codes[r][i * 4 + 3] = v.w;
        } else {
          EXL_UNROLL
          for (int w = 0; w < 4; ++w) codes[r][i * 4 + w] = next[r][i * 4 + w];
        }
      }
    }
  }
  EXL_DEVICE void advance(int stages) {
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) src[r] += stages * kLoads * 32;
  }
};
constexpr int kAhead = kHasCpAsync ? kStages - 1 : 1;   // stages on their way

// What a warp multiplies, and its way through it: weights of kR row tiles with their scales and zero points.
struct Weights {
  WeightRing ring;
  MetaStream stream[kR];
  Meta next[kR];

  // Everything up to the first product; touches no activations. first, last: the stages of this warp or block.
  EXL_DEVICE void start(u8* smem, int warp, int lane, const u32* codes, const void* scales, const u8* zeros, int tile0,
                        int num_tiles, int num_stages, int num_groups, int group_units, int first, int last) {
    ring.turn_to(smem, warp, lane, 0);
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) {
      const int tile = tile0 + r < num_tiles ? tile0 + r : num_tiles - 1;   // past the end: a copy that is not stored
      ring.src[r] = reinterpret_cast<const uint4*>(codes) + (static_cast<size_t>(tile) * num_stages + first) * (kLoads * 32) + lane;
      const size_t meta = static_cast<size_t>(tile) * num_groups * 8;
      stream[r].start(static_cast<const u32*>(scales) + meta, kSymmetric ? nullptr : zeros + meta * kZeroBytes, first, group_units, lane / 4);
    }
    EXL_UNROLL
    for (int s = 0; s < kAhead; ++s) {
      if (first + s < last) ring.fetch(s, s);
      cp_async_commit_group();
    }
    ring.advance(kAhead);
    if (first < last) {
      EXL_UNROLL
      for (int r = 0; r < kR; ++r) stream[r].load(next[r], 0, group_units);
    }
  }

  // acc += stages [start, stop) of K, of [start, last) that this warp will still read. x0, x1: see multiply_stage;
  // the next stage lies x_pitch halves further.
  template <int kNT>
  EXL_DEVICE void multiply(float (&acc)[kR][kNT][4], int start, int stop, int last, int group_units, const half* x0,
                           const half* x1, int pitch8, int x_pitch) {
    for (int base = start; base < stop; base += kStages) {
      const int here = stop - base, left = last - base;
      EXL_UNROLL
      for (int s = 0; s < kStages; ++s) {
        if (s >= here) break;
        cp_async_wait_group<kAhead - 1>();   // a lane reads only what it copied itself: no barrier
        u32 codes[kR][kLoads * 4];
        Meta meta[kR];
        ring.take(codes, s);
        EXL_UNROLL
        for (int r = 0; r < kR; ++r) meta[r] = next[r];
        if (s + kAhead < left) ring.fetch((s + kAhead) % kStages, s);
        cp_async_commit_group();
        if (s + 1 < left) {
          EXL_UNROLL
          for (int r = 0; r < kR; ++r) stream[r].load(next[r], s + 1, group_units);
        }
        multiply_stage<kNT>(acc, codes, meta, x0 + s * x_pitch, x1 + s * x_pitch, pitch8);
      }
      const int done = here < kStages ? here : kStages;
      ring.advance(done);
      EXL_UNROLL
      for (int r = 0; r < kR; ++r) stream[r].advance(done);
      x0 += kStages * x_pitch;
      x1 += kStages * x_pitch;
    }
  }
};
