// scale_logits: what becomes of the head's products before they are logits, in place.
//
//   x          f32 [num_rows, stride], V of each row: scale * x; or softcap * tanh(scale * x / softcap) if softcap > 0
//
// Block: 256 threads, four columns each; grid: (ceil(V / 1024), num_rows). No shared memory.
// Macros: none. Architectures: all. Tests: tests/kernels/test_small_kernels.py
#include <exl/softcap.cuh>

constexpr int kThreads = 256, kEach = 4;

EXL_KERNEL(scale_logits, 256, 4)
(float* x, int V, int stride, float scale, float softcap) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  float* row = x + static_cast<size_t>(blockIdx.y) * stride;
  const int first = static_cast<int>(blockIdx.x) * (kThreads * kEach) + static_cast<int>(threadIdx.x);
  EXL_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int column = first + i * kThreads;
    if (column < V) row[column] = capped(row[column] * scale, softcap);
  }
}
