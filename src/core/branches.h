// Work that may run beside the rest of a stream: a device that can do that implements this
// interface next to `Device`. Callers without one enqueue the same work in order on one stream.
#pragma once
#include "dsv4/device.h"

namespace dsv4 {

class StreamBranches {
 public:
  /// Branches of one stream that may be open at once.
  static constexpr int kMaxBranches = 2;

  virtual ~StreamBranches() = default;
  /// A stream whose work begins when all that is enqueued on `stream` so far has ended. It is the
  /// same one for the same `stream` and `branch` every time: work of an earlier fork comes first.
  /// Part of what is recorded if `stream` is.
  virtual Stream fork(Stream stream, int branch) = 0;
  /// What is enqueued on `stream` from now on waits for the branch. Every fork is joined before a
  /// recording ends.
  virtual void join(Stream stream, int branch) = 0;
};

/// Of a device; null where streams have no branches.
inline StreamBranches* branches_of(Device& device) {
  return dynamic_cast<StreamBranches*>(&device);
}

}  // namespace dsv4
