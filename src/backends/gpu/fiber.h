// One stack that can be left and entered again: what a lane of the executor runs on. x86-64 has its
// own switch of eight instructions; elsewhere ucontext, which asks the system twice a switch.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dsv4::gpu {

/// Not movable: the running code lives on it. Enters and leaves on one thread only.
class Fiber {
 public:
  Fiber();  ///< @throws Error kOutOfMemory
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// The next enter() starts `main` from the top of the stack; a stack left in the middle is
  /// dropped without destructors.
  void start(void (*main)());
  /// Runs the fiber until it calls leave().
  void enter();
  /// Called on the fiber: back to where it was entered. `finished`: it will not be entered again.
  void leave(bool finished = false);

 private:
  static void trampoline();

  static constexpr size_t kGuardBytes = 4096;
  char* memory_;
  void (*main_)() = nullptr;
#if defined(__x86_64__)
  void* inside_ = nullptr;  // stack pointers of the two sides
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
  // What the address sanitizer must know of the two stacks, and whether frames were left on this
  // one.
  bool dropped_frames_ = false;
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_bytes_ = 0;
  // The thread sanitizer's names of them.
  void* thread_inside_ = nullptr;
  void* thread_outside_ = nullptr;
};

}  // namespace dsv4::gpu
