// gated_product: activation(gate) * up, if gate and up could not share a launch.
//
//   gate, up   f16, bf16 or f32 (in_type 0, 1, 2) [num_tokens, N], rows `in_stride` apart
//   y          f16, bf16 or f32 (out_type) [num_tokens, N], rows `out_stride` apart; computed in f32, rounded once
//   channel_map i32 [N] or null: column n is stored at channel_map[n], for a consumer under act-order
//
// Block: 256 threads, one element each; grid: (ceil(N / 256), num_tokens). No shared memory.
// Macros: epilogue.cuh. Architectures: all. Tests: tests/kernels/test_small_kernels.py
#include <exl/epilogue.cuh>

EXL_DEVICE float load_value(const void* x, size_t at, int type) {
  if (type == kHalfOut) return __half2float(static_cast<const half*>(x)[at]);
  if (type == kBfloatOut) return __bfloat162float(static_cast<const bf16*>(x)[at]);
  return static_cast<const float*>(x)[at];
}

EXL_KERNEL(gated_product, 256, 4)
(const void* gate, const void* up, void* y, const int* __restrict__ channel_map, int N,
 int num_tokens, int in_type, int in_stride, int out_type, int out_stride) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int col = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), token = static_cast<int>(blockIdx.y);
  if (col >= N) return;
  const size_t at = static_cast<size_t>(token) * in_stride + col;
  const Output out{y, nullptr, nullptr, nullptr, nullptr, kStore, out_type, N, num_tokens, out_stride, 1.0f};
  store_output(out, token, channel_map ? channel_map[col] : col, activated(load_value(gate, at, in_type)) * load_value(up, at, in_type));
}
