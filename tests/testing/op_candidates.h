// Every candidate kernel of every device that this build knows, so that one test of an operation
// forces them all in turn.
#pragma once
#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/device.h"
#include "ops/ops.h"

namespace dsv4::testing {

struct OpCandidate {
  Platform platform = Platform::kCpu;
  std::string family;   ///< "linear", "attend", ...
  std::string name;     ///< "avx2", "sm90", "reference", ...
  std::string why_not;  ///< empty: it runs on this machine
  bool exact = true;    ///< takes f32 activations and caches, too
  /// "cpu_avx2": a name for a parameterised test.
  std::string label() const { return std::string(platform_name(platform)) + "_" + name; }
};

inline void PrintTo(const OpCandidate& candidate, std::ostream* out) {
  *out << candidate.label() << " of " << candidate.family;
}

/// Candidates of `family` (all families where it is empty): the CPU's, then those of GPU backends
/// that are built in.
std::vector<OpCandidate> op_candidates(const std::string& family);

/// A device of the candidate's platform and its table with the candidate forced; the other families
/// are the machine's best. `num_threads` counts on the CPU only.
struct OpenedCandidate {
  std::unique_ptr<Device> device;
  Ops ops;
};
OpenedCandidate open_candidate(const OpCandidate& candidate, int num_threads);

/// Of GPU backends; without CUDA in the build: none.
void append_cuda_candidates(const std::string& family, std::vector<OpCandidate>& out);
OpenedCandidate open_cuda_candidate(const std::string& forced);

/// Compiled kernels of AMD GPUs in the interpreter, per chip and wave order; without HIP in the
/// build: none. Not one of them: a result without a device.
void append_interpreted_candidates(const std::string& family, std::vector<OpCandidate>& out);
OpenedCandidate open_interpreted_candidate(const OpCandidate& candidate, int num_threads);

/// Of AMD GPUs, named kOnGpu + name; without HIP in the build: none. Opened by the name alone.
inline constexpr std::string_view kOnGpu = "gpu_";
void append_hip_candidates(const std::string& family, std::vector<OpCandidate>& out);
OpenedCandidate open_hip_candidate(const std::string& forced);

}  // namespace dsv4::testing
