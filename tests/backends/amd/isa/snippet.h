// A few lines of assembly executed on one wave, for tests of single instructions.
#pragma once
#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <memory>
#include <string>

#include "backends/amd/isa/decode.h"
#include "backends/amd/isa/wave.h"

namespace dsv4::amd::isa {

/// Lines without indentation; labels are not understood (branches count words of 4 bytes).
class Snippet {
 public:
  explicit Snippet(const std::string& text, Arch arch = Arch::kGfx950)
      : program_(indented(text), arch),
        rows_(std::make_unique<Row[]>(kMaxVectorRegs)),
        wave(rows_.get()) {
    for (int row = 0; row < kMaxVectorRegs; ++row)
      std::fill_n(rows_[row], kWaveSize, kVectorPoison);
    std::fill(std::begin(wave.scalar), std::end(wave.scalar), kScalarPoison);
    wave.group = &group;
    wave.set_exec(~uint64_t{0});
    wave.set_scalar64(Wave::kVcc, 0);
    group.arch = arch;
    group.global = &global;
    group.program = &program_;
    group.find_code = [](const void* program, uint64_t address) {
      return static_cast<const Program*>(program)->find(address);
    };
    group.lds.reset(4096, true);
  }

  /// Fills a vector register (256 + n: AGPR n).
  Snippet& v(int reg, const std::function<uint32_t(int)>& value) {
    for (int lane = 0; lane < kWaveSize; ++lane) wave.vector[reg][lane] = value(lane);
    return *this;
  }
  Snippet& v(int reg, uint32_t value) {
    return v(reg, [=](int) { return value; });
  }
  Snippet& vf(int reg, float value) { return v(reg, std::bit_cast<uint32_t>(value)); }
  Snippet& vd(int reg, double value) {
    const auto bits = std::bit_cast<uint64_t>(value);
    return v(reg, static_cast<uint32_t>(bits)).v(reg + 1, static_cast<uint32_t>(bits >> 32));
  }
  Snippet& s(int reg, uint32_t value) {
    wave.scalar[reg] = value;
    return *this;
  }
  Snippet& s64(int reg, uint64_t value) {
    wave.set_scalar64(reg, value);
    return *this;
  }

  /// Executes until the end of the text, s_endpgm or s_barrier. Throws Fault.
  Snippet& run() {
    while (wave.state == WaveState::kRunning &&
           static_cast<size_t>(wave.next) < program_.code().size()) {
      const Instruction& i = program_.code()[static_cast<size_t>(wave.next++)];
      if (!program_.problem(i.index).empty())
        throw Fault(program_.listed(i).text + ": " + program_.problem(i.index));
      i.execute(wave, i);
    }
    return *this;
  }

  uint32_t out(int reg, int lane = 0) const { return wave.vector[reg][lane]; }
  float out_f(int reg, int lane = 0) const { return std::bit_cast<float>(out(reg, lane)); }
  uint64_t out64(int reg, int lane = 0) const {
    return out(reg, lane) | static_cast<uint64_t>(out(reg + 1, lane)) << 32;
  }
  double out_d(int reg, int lane = 0) const { return std::bit_cast<double>(out64(reg, lane)); }

 private:
  static std::string indented(const std::string& text) {
    std::string out = "\t";
    for (const char c : text) {
      out += c;
      if (c == '\n') out += '\t';
    }
    return out;
  }
  Program program_;
  std::unique_ptr<Row[]> rows_;

 public:
  GlobalMemory global;
  Workgroup group;
  Wave wave;
};

/// v9 = `text` applied to v0, v1, v2 (v9 holds 0x11112222 before).
inline uint32_t eval(const std::string& text, uint32_t a = 0, uint32_t b = 0, uint32_t c = 0,
                     Arch arch = Arch::kGfx950) {
  Snippet snippet(text, arch);
  return snippet.v(0, a).v(1, b).v(2, c).v(9, 0x11112222u).run().out(9);
}
inline float eval_f(const std::string& text, float a = 0, float b = 0, float c = 0,
                    Arch arch = Arch::kGfx950) {
  return std::bit_cast<float>(eval(text, std::bit_cast<uint32_t>(a), std::bit_cast<uint32_t>(b),
                                   std::bit_cast<uint32_t>(c), arch));
}
/// v[8:9] = `text` applied to v[0:1], v[2:3], v[4:5].
inline uint64_t eval64(const std::string& text, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0) {
  Snippet snippet(text);
  const uint64_t values[] = {a, b, c};
  for (int k = 0; k < 3; ++k) {
    snippet.v(2 * k, static_cast<uint32_t>(values[k]))
        .v(2 * k + 1, static_cast<uint32_t>(values[k] >> 32));
  }
  return snippet.run().out64(8);
}
inline double eval_d(const std::string& text, double a = 0, double b = 0, double c = 0) {
  return std::bit_cast<double>(eval64(text, std::bit_cast<uint64_t>(a), std::bit_cast<uint64_t>(b),
                                      std::bit_cast<uint64_t>(c)));
}

/// The message of the Fault that `run` throws; empty when it throws none.
template <typename F>
std::string fault_of(F&& run) {
  try {
    run();
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

}  // namespace dsv4::amd::isa
