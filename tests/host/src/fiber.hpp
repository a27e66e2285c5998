#pragma once
// Lanes as fibers: a stack each, and a switch between two of them in a few instructions. swapcontext would make a
// system call at each switch to keep the signal mask, which costs more than all the rest of the shim.
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(EXL_UCONTEXT)
#define EXL_UCONTEXT
#endif
#if defined(EXL_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(EXL_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace exl_host {

struct Fiber {
  void* sp = nullptr;        // where it was left
  uint8_t* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(EXL_UCONTEXT)
  ucontext_t context;
#endif
};

#if !defined(EXL_UCONTEXT)
// The System V ABI's callee-saved registers; signal mask and floating-point modes are the same for all fibers.
extern "C" void exl_switch_stack(void** save_sp, void* load_sp);
asm(R"(
.text
.hidden exl_switch_stack
.globl exl_switch_stack
.type exl_switch_stack, @function
exl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size exl_switch_stack, .-exl_switch_stack
)");
#endif

// Stacks for `count` fibers, each above a page that no one may touch.
inline uint8_t* map_stacks(size_t count, size_t stack_bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), stride = stack_bytes + page;
  void* base =
      mmap(nullptr, count * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  for (size_t i = 0; i < count; ++i) mprotect(static_cast<uint8_t*>(base) + i * stride, page, PROT_NONE);
  return static_cast<uint8_t*>(base) + page;
}

inline void prepare(Fiber& fiber, void (*entry)()) {
#if defined(EXL_ASAN)
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // a fiber that was abandoned left its frames behind
  fiber.fake_stack = nullptr;
#endif
#if defined(EXL_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  uintptr_t* top = reinterpret_cast<uintptr_t*>(fiber.stack + fiber.stack_bytes) - 2;
  *top = reinterpret_cast<uintptr_t>(entry);  // `ret` goes there with the stack as after a call
  for (int i = 1; i <= 6; ++i) top[-i] = 0;
  fiber.sp = top - 6;
#endif
}

// Leaves `from` for `to`; returns when someone switches back. A fiber that ends or is given up is `leaving`.
inline void switch_fiber(Fiber& from, Fiber& to, bool leaving) {
#if defined(EXL_ASAN)
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  (void)leaving;
#if defined(EXL_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  exl_switch_stack(&from.sp, to.sp);
#endif
#if defined(EXL_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace exl_host
