#pragma once
// Lanes as fibers: each has a stack, and a switch takes a few instructions. swapcontext would make a
// system call per switch to keep the signal mask, which costs more than the rest of the shim.
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
  void* sp = nullptr;        // saved stack pointer
  uint8_t* stack = nullptr;  // lowest address of the stack
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(EXL_UCONTEXT)
  ucontext_t context;
#endif
};

#if !defined(EXL_UCONTEXT)
// Saves the System V ABI's callee-saved registers; all fibers share the signal mask and floating-point modes.
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

// Stacks for `count` fibers, each with a guard page below it.
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
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // an abandoned fiber leaves poisoned frames
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
  *top = reinterpret_cast<uintptr_t>(entry);  // `ret` jumps to entry with the stack as after a call
  for (int i = 1; i <= 6; ++i) top[-i] = 0;
  fiber.sp = top - 6;
#endif
}

// Switches from `from` to `to`; returns when another fiber switches back. `leaving`: `from` has ended or is abandoned.
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
