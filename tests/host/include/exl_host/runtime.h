#pragma once
// The border between a kernel's object file (instrumented by the sanitizers) and the runtime (not instrumented), and
// between the shared library and Python. Plain data, C linkage.
#include <stddef.h>
#include <stdint.h>

extern "C" {

// ---- called by kernels ---------------------------------------------------------------------------------------------

struct ExlDim {
  uint32_t x, y, z;
};
struct ExlFrag {
  float r[4];
};
struct ExlWords {
  uint32_t r[4];
};

extern const ExlDim* exl_thread_idx;  // of the lane that runs now
extern ExlDim exl_block_idx, exl_block_dim, exl_grid_dim;

uint32_t exl_prmt(uint32_t a, uint32_t b, uint32_t selector);
float exl_f32_from_f16(uint16_t h);
uint16_t exl_f16_from_f32(float f);
uint32_t exl_f16x2_from_f32(float lo, float hi);
uint16_t exl_bf16_from_f32(float f);
uint32_t exl_add_f16x2(uint32_t a, uint32_t b);
uint32_t exl_mul_f16x2(uint32_t a, uint32_t b);
uint32_t exl_fma_f16x2(uint32_t a, uint32_t b, uint32_t c);  // rounded once
void* exl_shared_memory();
void exl_syncthreads();
int exl_syncthreads_vote(int predicate, int kind);  // kind: 0 count, 1 and, 2 or
void exl_syncwarp(uint32_t mask);
uint64_t exl_shuffle(uint32_t mask, uint64_t value, int mode, uint32_t operand, int width);  // 0 idx 1 up 2 down 3 xor
uint32_t exl_vote(uint32_t mask, int predicate, int kind);                                   // 0 ballot, 1 all, 2 any
uint32_t exl_match(uint32_t mask, uint64_t value, int all, int* predicate);
uint32_t exl_reduce(uint32_t mask, uint32_t value,
                    int kind);  // 0 add, 1 umin, 2 umax, 3 imin, 4 imax, 5 and, 6 or, 7 xor
uint32_t exl_activemask();
ExlFrag exl_mma(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                float c2, float c3, int kind);  // 0 m16n8k16 f16, 1 m16n8k16 bf16, 2 m16n8k8 f16
ExlWords exl_ldmatrix(const void* row, int count, int transposed);
uint32_t exl_movmatrix(uint32_t a);
void exl_cp_async(void* dst, const void* src, uint32_t num_bytes, uint32_t src_bytes);
void exl_cp_async_commit();
void exl_cp_async_wait(int pending);
void exl_griddepcontrol_wait();
void exl_griddepcontrol_launch();
uint64_t exl_atomic(void* p, uint64_t value, uint64_t compare, int num_bytes, int kind);
void exl_access(const void* p, size_t num_bytes, int is_write);
void exl_trap(const char* why);

// ---- called by Python ----------------------------------------------------------------------------------------------

enum { kExlMaxParams = 64 };

struct ExlParam {     // one parameter of the kernel, as the compiler sees it
  char kind;          // 'p' pointer, 'i' signed, 'u' unsigned, 'f' floating point
  char element;       // of a pointer: the same letters, 'h' half, 'b' bf16, 'v' void, 's' any other struct
  uint8_t num_bytes;  // of the parameter
  uint8_t element_bytes;
  uint8_t is_const;  // pointer to const
};
struct ExlRange {  // memory that the kernel may touch
  uint64_t start, num_bytes;
  int32_t arg;  // index of the argument that it belongs to
  uint8_t writable;
  uint8_t early;  // may be touched before griddepcontrol.wait
};

struct ExlLaunch {
  ExlDim grid, block;
  uint64_t shared_bytes, seed;
  uint32_t num_ranges;
  uint8_t dependent;  // launched with the programmatic attribute
  const ExlRange* ranges;
  const uint64_t* args;
  void* workspace;  // of exl_host_workspace, one for all libraries of a process
};
struct ExlFault {  // why a launch stopped; {0} and {1} in the message stand for the two sites
  char message[2048];
  void* site[2];  // return addresses in the kernel
  ExlDim block, thread;
  int32_t warp, lane;
};
struct ExlStats {
  uint64_t switches, collectives, accesses;
};

int exl_host_params(ExlParam* out);                                 // count of the entry's parameters
uint32_t exl_host_max_threads();                                    // of EXL_KERNEL
__attribute__((visibility("default"))) void* exl_host_workspace();  // null: no room
__attribute__((visibility("default"))) int exl_host_launch(const ExlLaunch* launch,
                                                           ExlFault* fault);  // 0, or 1 with the fault filled in
__attribute__((visibility("default"))) void exl_host_stats(ExlStats* out);
__attribute__((visibility("default"))) const char* exl_host_build();
void exl_host_call(const uint64_t* args);  // the entry, with its arguments; made in kernel_main.hpp
}
