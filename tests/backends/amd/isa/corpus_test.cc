// Kernels compiled by clang for both chips, executed by the interpreter, against the same functions
// on the host: bit for bit where IEEE arithmetic leaves no choice.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "backends/amd/isa/machine.h"
#include "tests/backends/amd/isa/compiled.h"
#include "tests/backends/amd/isa/corpus/corpus.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {
namespace {

using dsv4::testing::Random;

template <typename T>
std::vector<T> inputs(Random& random, size_t count) {
  std::vector<T> out(count);
  for (size_t i = 0; i < count; ++i) {
    if constexpr (std::is_integral_v<T>) {
      // Small and large numbers, with some equal ones.
      const uint64_t bits = random.bits();
      const int shift = static_cast<int>(random.below(8 * static_cast<int64_t>(sizeof(T))));
      out[i] = static_cast<T>(static_cast<T>(bits) >> shift);
      if (i % 17 == 0) out[i] = static_cast<T>(i % 3 == 0 ? 0 : -1);
    } else {
      out[i] = static_cast<T>(random.normal() *
                              std::ldexp(1.0, static_cast<int>(random.below(40)) - 20));
      if (i % 13 == 0) out[i] = static_cast<T>(std::round(out[i]));
    }
  }
  return out;
}

template <typename T>
bool same(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) && std::isnan(b)) return true;
  }
  return std::memcmp(&a, &b, sizeof a) == 0;
}

template <typename F>
void check(const std::string& kernel, Arch arch, const std::vector<typename F::In>& a,
           const std::vector<typename F::In>& b, const std::vector<typename F::In>& c) {
  using In = typename F::In;
  using Out = typename F::Out;
  const int n = static_cast<int>(a.size());
  Machine machine(CodeObject::load(compiled("elementwise", arch)));
  std::vector<Out> out(a.size() * F::kResults);
  machine.add_read_only_buffer(a.data(), a.size() * sizeof(In), "a");
  machine.add_read_only_buffer(b.data(), b.size() * sizeof(In), "b");
  machine.add_read_only_buffer(c.data(), c.size() * sizeof(In), "c");
  machine.add_buffer(out.data(), out.size() * sizeof(Out), "out");
  const struct {
    const In *a, *b, *c;
    Out* out;
    int n;
  } arguments{a.data(), b.data(), c.data(), out.data(), n};
  machine.run(kernel, {static_cast<uint32_t>(n + 255) / 256}, {256},
              std::as_bytes(std::span(&arguments, 1)).first(36), {});
  int failures = 0;
  for (int i = 0; i < n; ++i) {
    Out expected[F::kResults];
    const size_t at = static_cast<size_t>(i);
    F::eval(a[at], b[at], c[at], expected);
    for (int k = 0; k < F::kResults; ++k) {
      const Out actual = out[at * F::kResults + static_cast<size_t>(k)];
      if (same(actual, expected[k])) continue;
      ADD_FAILURE() << kernel << " on " << arch_name(arch) << ", result " << k << " of (" << a[at]
                    << ", " << b[at] << ", " << c[at] << "): " << actual << ", expected "
                    << expected[k];
      if (++failures == 10) return;
    }
  }
}

class Corpus : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_compiled().empty()) GTEST_SKIP() << why_not_compiled();
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, Corpus, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

template <typename F>
void check_random(const std::string& kernel, Arch arch) {
  Random random(1);
  constexpr size_t kCount = 1000;  // not a multiple of the workgroup: lanes are switched off
  const auto a = inputs<typename F::In>(random, kCount), b = inputs<typename F::In>(random, kCount),
             c = inputs<typename F::In>(random, kCount);
  check<F>(kernel, arch, a, b, c);
}

TEST_P(Corpus, Int32Arithmetic) {
  check_random<corpus::Int32Arithmetic>("Int32Arithmetic", GetParam());
}
TEST_P(Corpus, Int32Bits) {
  check_random<corpus::Int32Bits>("Int32Bits", GetParam());
}
TEST_P(Corpus, Int64Arithmetic) {
  check_random<corpus::Int64Arithmetic>("Int64Arithmetic", GetParam());
}
TEST_P(Corpus, NarrowIntegers) {
  check_random<corpus::NarrowIntegers>("NarrowIntegers", GetParam());
}
TEST_P(Corpus, Float32Arithmetic) {
  check_random<corpus::Float32Arithmetic>("Float32Arithmetic", GetParam());
}
TEST_P(Corpus, Float32Convert) {
  check_random<corpus::Float32Convert>("Float32Convert", GetParam());
}
TEST_P(Corpus, Float64Arithmetic) {
  check_random<corpus::Float64Arithmetic>("Float64Arithmetic", GetParam());
}

}  // namespace
}  // namespace dsv4::amd::isa
