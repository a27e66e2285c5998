// embed: rows of the embedding -> the f32 residual and the sums of squares that the first norm needs.
//
//   table      f16 or bf16 (EXL_BF16) [vocab_size, C], in the device's memory or in page-locked memory of the host
//   ids        i32 [num_tokens]; -1 - i means samples[i]
//   samples    i32 [num_samples], the token ids that the previous step sampled, or null if no id is negative. They stay
//              on the device, so that the host need not wait for them
//   h          f32 [num_tokens, C]: scale * row; zeros if the id is out of range
//   sumsq      f32 [num_tokens, ceil(C / 16)]: sums of squares of 16 channels each, added in the order of epilogue.cuh
//   permuted   f32 [num_tokens, C], a second copy with channel n at channel_map[n] (i32 [C]), or null
//
// A thread has 8 channels, which are one load of 16 bytes; a warp reads 512 consecutive bytes, because over the bus
// short requests cost most. Two neighbours share a tile of 16 channels, and the first of them adds its squares. C is a
// multiple of 8. Block: 128 threads; grid: (ceil(C / 1024), num_tokens). No shared memory.
// Macros: EXL_BF16; EXL_SCALED, if defined: `scale` is not 1. Architectures: all. Tests: tests/kernels/test_small_kernels.py
#include <exl/rows.cuh>

constexpr int kTile = 16, kChannels = 8;
constexpr unsigned kAllLanes = 0xffffffffu;
#if defined(EXL_SCALED)
constexpr bool kScaled = true;
#else
constexpr bool kScaled = false;   // a kernel of its own: the multiplication would cost others registers
#endif

EXL_DEVICE float widened(u32 pair, int second) {
  if (EXL_BF16) return __uint_as_float(second ? pair & 0xffff0000u : pair << 16);
  return second ? __high2float(bits_half2(pair)) : __low2float(bits_half2(pair));
}

EXL_KERNEL(embed, 128, 4)
(const void* __restrict__ table, const i32* ids, const i32* samples, float* h, float* sumsq,
 float* permuted, const i32* __restrict__ channel_map, int C, int vocab_size, int num_samples, float scale) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int channel = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kChannels;
  const int token = static_cast<int>(blockIdx.y);
  int id = ids[token];
  if (id < 0) id = -1 - id < num_samples ? samples[-1 - id] : -1;
  const bool known = id >= 0 && id < vocab_size;
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (known && channel < C) {
    const u16* row = static_cast<const u16*>(table) + static_cast<size_t>(id) * C;
    bits = *reinterpret_cast<const uint4*>(row + channel);
  }
  const u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
  float v[kChannels], square[kChannels];
  EXL_UNROLL
  for (int i = 0; i < kChannels / 2; ++i) {
    // All lanes take part in the exchange, also those beyond the last channel.
    const u32 next = __shfl_down_sync(kAllLanes, pairs[i], 1);
    EXL_UNROLL
    for (int j = 0; j < 2; ++j) {
      float mine = widened(pairs[i], j), second = widened(next, j);
      if constexpr (kScaled) { mine *= scale; second *= scale; }
      v[2 * i + j] = mine;
      square[2 * i + j] = fmaf(second, second, mine * mine);
    }
  }
  if (channel >= C) return;
  const size_t at = static_cast<size_t>(token) * C + channel;
  float4* out = reinterpret_cast<float4*>(h + at);
  out[0] = make_float4(v[0], v[1], v[2], v[3]);
  out[1] = make_float4(v[4], v[5], v[6], v[7]);
  if (permuted != nullptr) {
    EXL_UNROLL
    for (int i = 0; i < kChannels; ++i) permuted[at - channel + channel_map[channel + i]] = v[i];
  }
  if (channel % kTile != 0) return;
  const int num_tiles = (C + kTile - 1) / kTile;
  sumsq[static_cast<size_t>(token) * num_tiles + channel / kTile] = tree_sum(square);
}
