#include "backends/cpu/isa.h"

#include <algorithm>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dsv4::cpu {
namespace {

#if defined(__x86_64__)
using Needs = std::vector<std::pair<bool, const char*>>;

// "needs a, b" of the names that are missing.
std::string missing(const Needs& needs) {
  std::string out;
  for (const auto& [has, name] : needs) {
    if (!has) out += (out.empty() ? "needs " : ", ") + std::string(name);
  }
  return out;
}

// clang 14 has no __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// What every file of AVX-512 needs, and `more`.
Needs avx512_and(const Needs& more) {
  Needs all{{__builtin_cpu_supports("avx512f"), "avx512f"},
            {__builtin_cpu_supports("avx512bw"), "avx512bw"},
            {__builtin_cpu_supports("avx512dq"), "avx512dq"},
            {__builtin_cpu_supports("avx512vl"), "avx512vl"}};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

// What the files need that permute bytes.
Needs vbmi_and(const Needs& more) {
  Needs all{{__builtin_cpu_supports("avx512vnni"), "avx512_vnni"},
            {__builtin_cpu_supports("avx512vbmi"), "avx512vbmi"}};
  all.insert(all.end(), more.begin(), more.end());
  return avx512_and(all);
}
#endif

}  // namespace

#if defined(__x86_64__)
std::string why_not_avx2() {
  return missing({{__builtin_cpu_supports("avx2"), "avx2"},
                  {__builtin_cpu_supports("fma"), "fma"},
                  {has_f16c(), "f16c"}});
}
std::string why_not_avx512() {
  return missing(avx512_and({}));
}
std::string why_not_avx512vnni() {
  return missing(avx512_and({{__builtin_cpu_supports("avx512vnni"), "avx512_vnni"}}));
}
std::string why_not_avx512vbmi() {
  return missing(vbmi_and({}));
}
std::string why_not_avx512bf16() {
  // Cooper Lake has the dot product, but no VBMI.
  return missing(vbmi_and({{__builtin_cpu_supports("avx512bf16"), "avx512_bf16"}}));
}
std::string cpu_maker() {
  unsigned eax = 0, name[3] = {};
  if (__get_cpuid(0, &eax, &name[0], &name[2], &name[1]) == 0) return {};
  std::string maker(sizeof(name), '\0');
  std::memcpy(maker.data(), name, sizeof(name));
  return maker;
}
#else
std::string why_not_avx2() {
  return "needs an x86-64 CPU";
}
std::string why_not_avx512() {
  return "needs an x86-64 CPU";
}
std::string why_not_avx512vnni() {
  return "needs an x86-64 CPU";
}
std::string why_not_avx512vbmi() {
  return "needs an x86-64 CPU";
}
std::string why_not_avx512bf16() {
  return "needs an x86-64 CPU";
}
std::string cpu_maker() {
  return {};
}
#endif

std::string runs_anywhere() {
  return {};
}

std::vector<Candidate> best_first(std::span<const Candidate> list, std::string_view maker) {
  std::vector<Candidate> out(list.begin(), list.end());
  const auto named = [&](std::string_view name) {
    return std::find_if(out.begin(), out.end(), [&](const Candidate& c) { return c.name == name; });
  };
  if (maker != "AuthenticAMD" && named("avx512") != out.end()) {
    std::rotate(named("avx512bf16"), named("avx512bf16") + 1, named("avx512") + 1);
  }
  return out;
}

}  // namespace dsv4::cpu
