// Small kernels, each correct with EXL_FAULT=0 and with a planted fault with 1 (and 2, ...). The shim must pass the correct
// ones and stop the others. One block of 64 threads unless noted; x and y are f32 [64].
// Tests: tests/kernels/test_shim_faults.py.
#include <exl/half.cuh>

#ifndef EXL_FAULT
#define EXL_FAULT 0
#endif
constexpr int kFault = EXL_FAULT;

// y[i] = x[i ^ 32]. Fault: no barrier between a read and the next write, although that writes the same values.
EXL_KERNEL(removed_barrier, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x;
  buffer[i] = x[i];
  __syncthreads();
  y[i] = buffer[i ^ 32];
  if (kFault == 0) __syncthreads();
  buffer[i] = x[i];
}

// y[i] = x[i ^ 32]. Fault: no barrier before reading.
EXL_KERNEL(missing_barrier, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x;
  buffer[i] = x[i];
  if (kFault == 0) __syncthreads();
  y[i] = buffer[i ^ 32];
}

// y[i] = x[i ^ 1] within warps. Fault 1: nothing orders write and read; 2: only a shuffle, which orders nothing; 3: a
// __syncwarp of the even lanes and one of the odd lanes, which order each among themselves.
EXL_KERNEL(missing_syncwarp, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x;
  buffer[i] = x[i];
  if (kFault == 0) __syncwarp();
  if (kFault == 2) __shfl_xor_sync(~0u, i, 1);
  if (kFault == 3) __syncwarp(i % 2 ? 0xaaaaaaaau : 0x55555555u);
  y[i] = buffer[i ^ 1];
}

// y[i] = x[i ^ 2] with pairs of lanes two apart. Correct: each __syncwarp names the four lanes that exchange.
EXL_KERNEL(partial_syncwarp, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x, lane = i % 32;
  buffer[i] = x[i];
  __syncwarp(0xfu << (lane / 4 * 4));
  y[i] = buffer[kFault ? i ^ 4 : i ^ 2];
}

// y = x through shared memory; each lane copies its own 16 bytes. Fault 1: no wait; 2: waits for all but the newest
// group, and reads the newest; 3: committed too late; 4: a neighbour's bytes, with no barrier after the wait.
EXL_KERNEL(wait_count, 16, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float4, buffer);
  const int i = threadIdx.x;
  cp_async_16(buffer + i, x + 4 * i);
  cp_async_commit_group();
  cp_async_16(buffer + 16 + i, x + 4 * i);
  if (kFault != 3) cp_async_commit_group();
  if (kFault != 1) {
    if (kFault == 2) cp_async_wait_group<1>();
    else cp_async_wait_group<0>();
  }
  if (kFault == 4) {
    const float4 v = buffer[16 + (i ^ 1)];
    reinterpret_cast<float4*>(y)[i ^ 1] = v;
  } else {
    reinterpret_cast<float4*>(y)[i] = buffer[16 + i];
  }
}

// y = x through a copy of 4, 8 or 16 bytes with zero fill beyond `valid` floats.
EXL_KERNEL(zero_fill, 16, 1)(const float* x, float* y, int valid) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x, left = valid - 4 * i;
  const u32 bytes = static_cast<u32>(left <= 0 ? 0 : left >= 4 ? 16 : 4 * left);
  cp_async_16(buffer + 4 * i, x + 4 * i, bytes);
  cp_async_8(buffer + 64 + 4 * i, x + 4 * i, bytes < 8 ? bytes : 8);
  cp_async_8(buffer + 66 + 4 * i, x + 4 * i + 2, bytes < 8 ? 0 : bytes - 8);
  cp_async_4(buffer + 128 + i, x + i, i < valid ? 4 : 0);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  for (int j = 0; j < 4; ++j) {
    y[4 * i + j] = buffer[4 * i + j];
    y[64 + 4 * i + j] = buffer[64 + 4 * i + j];
  }
  y[128 + i] = buffer[128 + i];
}

// The source of a copy changes while the copy is in flight.
EXL_KERNEL(changing_source, 16, 1)(float* x, float* y) {
  EXL_DYNAMIC_SMEM(float4, buffer);
  const int i = threadIdx.x;
  cp_async_16(buffer + i, x + 4 * i);
  cp_async_commit_group();
  if (kFault) x[4 * i] += 1.0f;
  cp_async_wait_group<0>();
  reinterpret_cast<float4*>(y)[i] = buffer[i];
}

// y = x through shared memory of 64 floats. Faults: one element past the end, or before the start, in one thread.
EXL_KERNEL(out_of_bounds, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x;
  const bool last = i == 63, first = i == 0;
  buffer[i + (kFault == 1 && last ? 1 : 0)] = x[i];                      // 1: shared write
  float v = buffer[i - (kFault == 2 && first ? 1 : 0)];                  // 2: shared read, before the start
  v += x[i + (kFault == 3 && last ? 1 : 0)] - x[i];                      // 3: global read
  if (kFault == 4 && first) v += x[i - 1];                               // 4: global read, before the start
  y[i + (kFault == 5 && last ? 1 : 0)] = v;                              // 5: global write
  if (kFault == 6 && last) y[100000] = v;                                // 6: far away
}

// Tail of a vector load: 16 bytes at the last 8 of the buffer.
EXL_KERNEL(vector_tail, 64, 1)(const float* x, float* y) {
  const int i = threadIdx.x;
  if (i % 4) return;
  const float4 v = *reinterpret_cast<const float4*>(x + i + (kFault && i == 60 ? 4 : 0));
  *reinterpret_cast<float4*>(y + i) = v;
}

// y = x. Faults: 1 half of the threads skip the barrier; 2 two barriers in two branches; 3 one thread has left; 4 some
// wait in a warp collective.
EXL_KERNEL(divergent_barrier, 64, 1)(const float* x, float* y) {
  const int i = threadIdx.x;
  if (kFault == 3 && i == 5) return;
  if (kFault == 1) {
    if (i < 32) __syncthreads();
  } else if (kFault == 2) {
    if (i < 32) __syncthreads();
    else __syncthreads();
  } else if (kFault == 4) {
    if (i < 32 && i != 7) __syncwarp();
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[i] = x[i];
}

// y = x plus zero times shared memory that was never written.
EXL_KERNEL(never_written, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const int i = threadIdx.x;
  if (kFault == 0 || i != 17) buffer[i] = x[i];
  const float v = buffer[i];
  y[i] = v == v ? v : x[i];
}

// y[i] = x[i ^ 1]. Faults: 1 two call sites, 2 two kinds, 3 different masks, 4 a lane outside of its mask, 5 a lane of
// the mask has left, 6 a source lane outside of the mask.
EXL_KERNEL(collective_sites, 64, 1)(const float* x, float* y) {
  const int i = threadIdx.x, lane = i % 32;
  float v = x[i];
  if (kFault == 1) {
    if (lane < 16) v = __shfl_xor_sync(~0u, v, 1);
    else v = __shfl_xor_sync(~0u, v, 1) + 0.0f;
  } else if (kFault == 2) {
    if (lane < 16) v = __shfl_xor_sync(~0u, v, 1);
    else v = __ballot_sync(~0u, 1) ? v : 0.0f;
  } else if (kFault == 3) {
    v = __shfl_xor_sync(lane < 31 ? ~0u : 0xfffffffeu, v, 1);
  } else if (kFault == 4) {
    v = __shfl_xor_sync(0x0000ffffu, v, 1);
  } else if (kFault == 5) {
    if (i == 3) return;
    v = __shfl_xor_sync(~0u, v, 1);
  } else if (kFault == 6) {
    if (lane < 16) v = __shfl_sync(0x0000ffffu, v, lane ^ 16);
  } else {
    v = __shfl_xor_sync(~0u, v, 1);
  }
  y[i] = v;
}

// y = x, with undefined behaviour of C++: 1 a misaligned vector, 2 a signed overflow, 3 a shift by 32, 4 a
// local array's end, 5 a float beyond int, 6 a division by zero.
EXL_KERNEL(undefined, 64, 1)(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  float local[8];
  for (int j = 0; j < 8; ++j) local[j] = x[j];
  int v = 0;
  if (kFault == 1 && i == 1) v += static_cast<int>(reinterpret_cast<const float4*>(x + 1)->x);
  if (kFault == 2) v += 2147483647 - 63 + i + n - 63;
  if (kFault == 3) v += 1 << (n - 32);
  if (kFault == 4) v += static_cast<int>(local[n / 8]);
  if (kFault == 5) v += static_cast<int>(x[i] * 1e30f);
  if (kFault == 6) v += i / (n - 64);
  y[i] = x[i] + (v == 12345 ? local[i % 8] : 0.0f);
}

// y = x. Fault: writes to memory that it declares const.
EXL_KERNEL(const_write, 64, 1)(const float* x, float* y) {
  const int i = threadIdx.x;
  if (kFault) const_cast<float*>(x)[i] = 0.0f;
  y[i] = x[i];
}

// y = x. Fault: a wild pointer.
EXL_KERNEL(wild_pointer, 64, 1)(const float* x, float* y) {
  const int i = threadIdx.x;
  const u64 nowhere = 0x123456789000ull;
  if (kFault && i == 9) *reinterpret_cast<volatile float*>(nowhere) = 1.0f;
  y[i] = x[i];
}

// y = x * w: w are weights, x is written by the previous launch. Fault: x is read before griddepcontrol.wait.
EXL_KERNEL(early_read, 64, 1)(const float* x, const float* w, float* y) {
  const int i = threadIdx.x;
  const float weight = w[i];
  float v = 0.0f;
  if (kFault == 1) v = x[i];
  if (kFault != 2 || i < 32) griddepcontrol_wait();
  if (kFault == 0) __syncwarp();
  if (kFault != 1) v = x[i];
  y[i] = v * weight;
}

// y = x through every kind of object that kernels keep in shared memory: halves by value, pairs, vectors, a structure of
// 24 bytes. Fault k: no barrier before another warp reads the k-th of them; the values come from a copy of it.
struct Record { float v[6]; };
template <class T> EXL_DEVICE T passed_on(T v) { return v; }
EXL_KERNEL(exchanged_objects, 64, 1)(const float* x, float* y) {
  EXL_DYNAMIC_SMEM(Record, records);   // [64], then half [64], half2 [64], float4 [64]
  float4* vectors = reinterpret_cast<float4*>(records + 64);
  half2* pairs = reinterpret_cast<half2*>(vectors + 64);
  half* halves = reinterpret_cast<half*>(pairs + 64);
  const int i = threadIdx.x, other = i ^ 32;
  Record mine = {};
  mine.v[5] = x[i];
  if (kFault != 1) records[i] = mine;
  if (kFault != 2) vectors[i] = make_float4(0.0f, x[i], 0.0f, 0.0f);
  if (kFault != 3) pairs[i] = __floats2half2_rn(0.0f, x[i]);
  if (kFault != 4) halves[i] = __float2half_rn(x[i]);
  __syncthreads();
  if (kFault == 1) records[i] = mine;
  if (kFault == 2) vectors[i] = make_float4(0.0f, x[i], 0.0f, 0.0f);
  if (kFault == 3) pairs[i] = __floats2half2_rn(0.0f, x[i]);
  if (kFault == 4) halves[i] = __float2half_rn(x[i]);
  const Record record = passed_on(records[other]);
  const float4 vector = passed_on(vectors[other]);
  const float h = __half2float(passed_on(halves[other])), p = __high2float(passed_on(pairs[other]));
  y[i] = record.v[5] == vector.y && h == p ? record.v[5] : 0.0f;
}

// Counts in shared and global memory. Fault: plain additions besides the atomic ones.
EXL_KERNEL(mixed_atomics, 64, 1)(int* total, int* y) {
  EXL_DYNAMIC_SMEM(int, count);
  const int i = threadIdx.x;
  if (i == 0) *count = 0;
  __syncthreads();
  if (kFault && i == 40) *count += 1;
  else atomicAdd(count, 1);
  __syncthreads();
  y[i] = *count;
  if (i == 0) atomicAdd(total, *count);
}
