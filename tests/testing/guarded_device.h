// A device whose every allocation lies between guard bytes and starts as 0xff (NaN in every float
// format): what reads unwritten memory or writes beside its own is found, on any device. Steps take
// the way of devices with branches; where the inner one has none, a branch is the stream itself.
#pragma once
#include <gtest/gtest.h>

#include <list>
#include <memory>
#include <vector>

#include "core/branches.h"
#include "dsv4/device.h"

namespace dsv4::testing {

class GuardedDevice final : public Device, public StreamBranches {
 public:
  explicit GuardedDevice(std::unique_ptr<Device> inner) : inner_(std::move(inner)) {}

  DeviceId id() const override { return inner_->id(); }
  std::string description() const override { return inner_->description(); }
  Buffer allocate(int64_t bytes) override {
    Piece& piece = pieces_.emplace_back();
    piece.memory = inner_->allocate(bytes + 2 * kGuardBytes);
    piece.bytes = bytes;
    std::vector<std::byte> fill(static_cast<size_t>(bytes + 2 * kGuardBytes), kGuard);
    std::fill_n(fill.begin() + kGuardBytes, bytes, std::byte{0xff});
    inner_->copy_to_device(piece.memory.data(), fill.data(), static_cast<int64_t>(fill.size()),
                           default_stream());
    inner_->synchronize(default_stream());
    return Buffer(piece.memory.data() + kGuardBytes, bytes, [this, &piece](void*) {
      EXPECT_TRUE(intact(piece));
      pieces_.remove_if([&](const Piece& other) { return &other == &piece; });
    });
  }
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream stream) override {
    inner_->copy_to_device(device, host, bytes, stream);
  }
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream stream) override {
    inner_->copy_to_host(host, device, bytes, stream);
  }
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) override {
    inner_->copy_on_device(to, from, bytes, stream);
  }
  void synchronize(Stream stream) override { inner_->synchronize(stream); }
  bool reads_host_memory() const override { return inner_->reads_host_memory(); }
  Stream default_stream() override { return inner_->default_stream(); }
  bool can_record() const override { return inner_->can_record(); }
  std::unique_ptr<RecordedWork> record(Stream stream, const std::function<void()>& body) override {
    return inner_->record(stream, body);
  }
  Stream fork(Stream stream, int branch) override {
    StreamBranches* inner = branches_of(*inner_);
    return inner == nullptr ? stream : inner->fork(stream, branch);
  }
  void join(Stream stream, int branch) override {
    if (StreamBranches* inner = branches_of(*inner_)) inner->join(stream, branch);
  }
  int num_threads() const override { return inner_->num_threads(); }
  const Ops& ops() const override { return inner_->ops(); }

  /// Fails when a byte around any living piece was written.
  ::testing::AssertionResult guards_intact() {
    for (const Piece& piece : pieces_) {
      if (auto result = intact(piece); !result) return result;
    }
    return ::testing::AssertionSuccess();
  }

 private:
  static constexpr int64_t kGuardBytes = 4096;
  static constexpr std::byte kGuard{0xa5};
  struct Piece {
    Buffer memory;
    int64_t bytes = 0;
  };
  ::testing::AssertionResult intact(const Piece& piece) {
    std::vector<std::byte> guards(2 * kGuardBytes);
    const Stream stream = default_stream();
    inner_->copy_to_host(guards.data(), piece.memory.data(), kGuardBytes, stream);
    inner_->copy_to_host(guards.data() + kGuardBytes,
                         piece.memory.data() + kGuardBytes + piece.bytes, kGuardBytes, stream);
    inner_->synchronize(stream);
    for (size_t i = 0; i < guards.size(); ++i) {
      if (guards[i] == kGuard) continue;
      const auto at = static_cast<int64_t>(i);
      return ::testing::AssertionFailure()
             << "byte " << (at < kGuardBytes ? at - kGuardBytes : at - kGuardBytes + piece.bytes)
             << " of a piece of " << piece.bytes << " bytes was overwritten";
    }
    return ::testing::AssertionSuccess();
  }

  std::unique_ptr<Device> inner_;
  std::list<Piece> pieces_;
};

}  // namespace dsv4::testing
