// append_kv: prepares new tokens for attention: norm, RoPE, Hadamard rotation; K and V go to their pages, q to a buffer.
//
//   qkv        f16, bf16 or f32 (in_type 0, 1, 2) [num_tokens, qkv_stride]: H heads of q, Hkv of K, Hkv of V, kD each
//   q_norm, k_norm   f32 [kD], or null: RMSNorm over a head's channels
//   cosine, sine     f32 [num_tokens, half_dim]: RoPE turns channels c and c + half_dim; channels from 2 half_dim on stay
//   slots      i32 [num_tokens]: page * 64 + place in the page, or -1: K and V of this token are not stored
//   pages      u8 [pages][Hkv][kPageBytes] (page.cuh) of one layer
//   q          f16 [num_tokens, H, kD], saturated: after norm and RoPE, and, if pages are quantized, rotated as K is
//
// One warp per head and token. Block: 8 warps; grid: (ceil((H + 2 Hkv) / 8), num_tokens). Shared bytes: 8 * kD * 4.
// Macros: page.cuh. Architectures: all. Tests: tests/kernels/test_append_kv.py
#include <exl/head_row.cuh>

constexpr int kWarps = 8;

EXL_KERNEL(append_kv, 256, 2)
(const void* qkv, const float* __restrict__ q_norm, const float* __restrict__ k_norm,
 const float* cosine, const float* sine, const i32* slots, u8* pages, half* q, int num_heads, int num_kv_heads,
 int half_dim, int in_type, int qkv_stride, float eps) {
  EXL_DYNAMIC_SMEM(float, smem);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int head = static_cast<int>(blockIdx.x) * kWarps + warp, token = static_cast<int>(blockIdx.y);
  if (head >= num_heads + 2 * num_kv_heads) return;   // whole warps; there is no block barrier
  const bool is_q = head < num_heads, is_v = head >= num_heads + num_kv_heads;
  const int slot = slots[token];
  if (!is_q && slot < 0) return;

  float* row = smem + warp * kD;
  const size_t at = static_cast<size_t>(token) * qkv_stride + head * kD;
  for (int c = lane; c < kD; c += 32) row[c] = load_value(qkv, at + c, in_type);
  __syncwarp();
  if (!is_v) {
    const float* norm = is_q ? q_norm : k_norm;
    if (norm != nullptr) normalise(row, norm, eps, lane);
    const size_t angle = static_cast<size_t>(token) * half_dim;
    rotate_by_position(row, cosine + angle, sine + angle, half_dim, lane);
  }
  rotate_by_hadamard(row, lane);
  if (is_q) {
    half* out = q + (static_cast<size_t>(token) * num_heads + head) * kD;
    for (int c = lane; c < kD; c += 32) out[c] = saturated_half(row[c]);
    return;
  }
  const int kv_head = is_v ? head - num_heads - num_kv_heads : head - num_heads;
  u8* page = pages + (static_cast<size_t>(slot / kPageTokens) * num_kv_heads + kv_head) * kPageBytes;
  if (is_v) store_row<true>(page, slot % kPageTokens, row, lane);
  else store_row<false>(page, slot % kPageTokens, row, lane);
}
