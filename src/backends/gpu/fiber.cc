#include "backends/gpu/fiber.h"

#include <sys/mman.h>

#include <cstdlib>

#include "core/fail.h"

#if defined(__has_feature)
#define DSV4_HAS_FEATURE(name) __has_feature(name)
#else
#define DSV4_HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || DSV4_HAS_FEATURE(address_sanitizer)
#define DSV4_ADDRESS_SANITIZER 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define DSV4_ADDRESS_SANITIZER 0
#endif
#if defined(__SANITIZE_THREAD__) || DSV4_HAS_FEATURE(thread_sanitizer)
#define DSV4_THREAD_SANITIZER 1
#include <sanitizer/tsan_interface.h>
#else
#define DSV4_THREAD_SANITIZER 0
#endif

namespace dsv4::gpu {
namespace {

constexpr bool kSanitized = DSV4_ADDRESS_SANITIZER || DSV4_THREAD_SANITIZER;
constexpr size_t kStackBytes = (kSanitized ? 256 : 64) * 1024;  // frames grow under sanitizers

thread_local Fiber* t_current = nullptr;

}  // namespace

#if defined(__x86_64__)
// Saves the registers that a call must keep, and the stack pointer; takes the other side's.
extern "C" void dsv4_gpu_fiber_switch(void** from, void* to);
asm(R"(
.text
.globl dsv4_gpu_fiber_switch
.hidden dsv4_gpu_fiber_switch
.type dsv4_gpu_fiber_switch,@function
dsv4_gpu_fiber_switch:
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
.size dsv4_gpu_fiber_switch,.-dsv4_gpu_fiber_switch
)");
#endif

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    fail(ErrorCode::kOutOfMemory, "executor: no memory for a stack of ", kStackBytes, " bytes");
  }
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kGuardBytes, PROT_NONE);  // an overflow stops at once
#if DSV4_THREAD_SANITIZER
  thread_inside_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if DSV4_THREAD_SANITIZER
  __tsan_destroy_fiber(thread_inside_);
#endif
  munmap(memory_, kGuardBytes + kStackBytes);
}

void Fiber::start(void (*main)()) {
  main_ = main;
  fake_inside_ = nullptr;
  char* stack = memory_ + kGuardBytes;
#if DSV4_ADDRESS_SANITIZER
  if (dropped_frames_) __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  dropped_frames_ = true;  // until `main` returns
#if defined(__x86_64__)
  // As if `trampoline` had been called: six registers, its address, and a return address that is
  // never used but keeps the stack aligned as after a call.
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::trampoline);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  inside_ = top;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack;
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  makecontext(&inside_, &Fiber::trampoline, 0);
#endif
}

void Fiber::trampoline() {
  Fiber* self = t_current;
#if DSV4_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_bottom_, &self->outside_bytes_);
#endif
  self->main_();
  self->dropped_frames_ = false;
  self->leave(true);
  std::abort();  // a finished fiber was entered
}

void Fiber::enter() {
  Fiber* before = t_current;
  t_current = this;
#if DSV4_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&fake_outside_, memory_ + kGuardBytes, kStackBytes);
#endif
#if DSV4_THREAD_SANITIZER
  thread_outside_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread_inside_, 0);
#endif
#if defined(__x86_64__)
  dsv4_gpu_fiber_switch(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
#if DSV4_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);
#endif
  t_current = before;
}

void Fiber::leave([[maybe_unused]] bool finished) {
#if DSV4_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake_inside_, outside_bottom_,
                                 outside_bytes_);
#endif
#if DSV4_THREAD_SANITIZER
  __tsan_switch_to_fiber(thread_outside_, 0);
#endif
#if defined(__x86_64__)
  dsv4_gpu_fiber_switch(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
#if DSV4_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_inside_, &outside_bottom_, &outside_bytes_);
#endif
}

}  // namespace dsv4::gpu
