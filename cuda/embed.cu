// embed: rows of the embedding -> the f32 residual and the sums of squares that the first norm needs.
//
//   table      f16 or bf16 (EXL_BF16) [vocab_size, C]
//   ids        i32 [num_tokens]; -1 - i means samples[i]
//   samples    i32 [num_samples], the token ids that the previous step sampled, or null if no id is negative. They stay
//              on the device, so that the host need not wait for them
//   h          f32 [num_tokens, C]; zeros if the id is out of range
//   sumsq      f32 [num_tokens, ceil(C / 16)]: sums of squares of 16 channels each, added in the order of epilogue.cuh
//   permuted   f32 [num_tokens, C], a second copy with channel n at channel_map[n] (i32 [C]), or null
//
// A thread has 16 channels; C is a multiple of 8. Block: 128 threads; grid: (ceil(C / 2048), num_tokens). No shared memory.
// Macros: EXL_BF16. Architectures: all. Tests: tests/kernels/test_small_kernels.py
#include <exl/half.cuh>

constexpr int kTile = 16;

EXL_DEVICE float widened(u32 pair, int second) {
  if (EXL_BF16) return __uint_as_float(second ? pair & 0xffff0000u : pair << 16);
  return second ? __high2float(bits_half2(pair)) : __low2float(bits_half2(pair));
}

EXL_KERNEL(embed, 128, 4)
(const void* __restrict__ table, const i32* ids, const i32* samples, float* h, float* sumsq,
 float* permuted, const i32* __restrict__ channel_map, int C, int vocab_size, int num_samples) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int tile = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), num_tiles = (C + kTile - 1) / kTile;
  const int token = static_cast<int>(blockIdx.y);
  if (tile >= num_tiles) return;
  int id = ids[token];
  if (id < 0) id = -1 - id < num_samples ? samples[-1 - id] : -1;
  const bool known = id >= 0 && id < vocab_size;
  const u16* row = static_cast<const u16*>(table) + static_cast<size_t>(known ? id : 0) * C;
  float v[kTile];
  EXL_UNROLL
  for (int half_tile = 0; half_tile < 2; ++half_tile) {   // C is a multiple of 8
    const int channel = tile * kTile + half_tile * 8;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (known && channel < C) bits = *reinterpret_cast<const uint4*>(row + channel);
    const u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    EXL_UNROLL
    for (int i = 0; i < 8; ++i) v[half_tile * 8 + i] = widened(pairs[i / 2], i % 2);
    if (channel < C) {
      float* out = h + static_cast<size_t>(token) * C + channel;
      EXL_UNROLL
      for (int i = 0; i < 8; ++i) {
        out[i] = v[half_tile * 8 + i];
        if (permuted != nullptr) permuted[static_cast<size_t>(token) * C + channel_map[channel + i]] = v[half_tile * 8 + i];
      }
    }
  }
  float square[8];
  EXL_UNROLL
  for (int g = 0; g < 8; ++g) square[g] = fmaf(v[g + 8], v[g + 8], v[g] * v[g]);
  EXL_UNROLL
  for (int d = 1; d < 8; d *= 2) {   // the same tree as the shuffles over lanes in epilogue.cuh
    EXL_UNROLL
    for (int g = 0; g < 8; g += 2 * d) square[g] += square[g + d];
  }
  sumsq[static_cast<size_t>(token) * num_tiles + tile] = square[0];
}
