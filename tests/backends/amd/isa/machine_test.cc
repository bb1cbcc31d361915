// Loading and running without any tool: code objects and their listings are committed beside this.
#include "backends/amd/isa/machine.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "dsv4/error.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {
namespace {

std::string data_file(const std::string& name) {
  std::ifstream file(std::string(DSV4_SOURCE_DIR) + "/tests/backends/amd/isa/data/" + name,
                     std::ios::binary);
  EXPECT_TRUE(file) << name;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}
std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

class Committed : public ::testing::TestWithParam<Arch> {
 protected:
  std::string name() const { return std::string("add_scaled_") + arch_name(GetParam()); }
  CodeObject code() const {
    return CodeObject::from_bytes(bytes_of(data_file(name() + ".co")), data_file(name() + ".s"));
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, Committed, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

TEST_P(Committed, Metadata) {
  const CodeObject object = code();
  EXPECT_EQ(object.arch(), GetParam());
  ASSERT_EQ(object.kernels().size(), 1u);
  const KernelInfo& kernel = object.kernel("add_scaled");
  EXPECT_EQ(kernel.max_workgroup_size, 128u);
  EXPECT_EQ(kernel.lds_bytes, 512u);
  EXPECT_EQ(kernel.scratch_bytes, 0u);
  EXPECT_EQ(kernel.vgpr_spills + kernel.sgpr_spills, 0u);
  EXPECT_EQ(kernel.num_agprs, 0u);
  EXPECT_GT(kernel.num_vgprs, 0u);
  EXPECT_EQ(kernel.kernarg_bytes, 32u);
  EXPECT_EQ(kernel.explicit_bytes(), 32u);
  ASSERT_EQ(kernel.arguments.size(), 5u);
  EXPECT_EQ(kernel.arguments[0].kind, "global_buffer");
  EXPECT_EQ(kernel.arguments[3].offset, 24u);
  EXPECT_TRUE(object.program().problems(kernel.begin, kernel.end).empty());
}

TEST_P(Committed, Runs) {
  constexpr int kCount = 300;  // two waves of the last workgroup are partly or wholly idle
  dsv4::testing::Random random(1);
  std::vector<float> a = random.normals(kCount, 1), b = random.normals(kCount, 1), out(kCount);
  Machine machine(code());
  machine.add_read_only_buffer(a.data(), a.size() * 4, "a");
  machine.add_read_only_buffer(b.data(), b.size() * 4, "b");
  machine.add_buffer(out.data(), out.size() * 4, "out");
  const struct {
    const float *a, *b;
    float* out;
    float scale;
    int n;
  } arguments{a.data(), b.data(), out.data(), 0.5f, kCount};
  machine.run("add_scaled", {3}, {128}, arguments);
  for (size_t i = 0; i < kCount; ++i) EXPECT_EQ(out[i], a[i] + 0.5f * b[i ^ 1]) << i;
}

// A changed listing is what a changed kernel would be: each of these must be noticed.
TEST_P(Committed, MutationsAreNoticed) {
  const std::string object = data_file(name() + ".co"), listing = data_file(name() + ".s");
  const auto run = [&](const std::string& mutated) {
    constexpr int kCount = 256;
    std::vector<float> a(kCount, 1.0f), b(kCount), out(kCount);
    for (size_t i = 0; i < kCount; ++i) b[i] = static_cast<float>(i);
    Machine machine(CodeObject::from_bytes(bytes_of(object), mutated));
    machine.add_read_only_buffer(a.data(), a.size() * 4, "a");
    machine.add_read_only_buffer(b.data(), b.size() * 4, "b");
    machine.add_buffer(out.data(), out.size() * 4, "out");
    const struct {
      const float *a, *b;
      float* out;
      float scale;
      int n;
    } arguments{a.data(), b.data(), out.data(), 0.5f, kCount};
    try {
      machine.run("add_scaled", {2}, {128}, arguments);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    for (size_t i = 0; i < kCount; ++i) {
      if (out[i] != a[i] + 0.5f * b[i ^ 1]) return std::string("wrong result");
    }
    return std::string();
  };
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string out = listing;
    const size_t at = out.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return at == std::string::npos ? out : out.replace(at, from.size(), to);
  };
  EXPECT_EQ(run(listing), "");
  EXPECT_NE(run(replaced("global_store_dword", "global_store_qword")).find("`global_store_qword"),
            std::string::npos);
  EXPECT_NE(run(replaced("global_store_dword", "global_store_qword")).find("not modelled"),
            std::string::npos);
  EXPECT_NE(run(replaced("ds_read_b32", "ds_read_u16")), "");
  EXPECT_NE(run(replaced("ds_write_b32 v", "ds_write_b32 v9")).find("uses register"),
            std::string::npos);
}

TEST(CodeObjects, BadFilesAreRefused) {
  const auto error_of = [](const std::string& bytes) {
    try {
      CodeObject::from_bytes(bytes_of(bytes), "");
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(error_of(""), "");
  EXPECT_NE(error_of(std::string(100, 'x')).find("not a code object"), std::string::npos);
  const std::string good = data_file("add_scaled_gfx942.co");
  EXPECT_EQ(error_of(good), "");
  std::string host = good;
  host[18] = 62;  // e_machine of x86-64
  EXPECT_NE(error_of(host).find("not a code object"), std::string::npos);
  std::string other = good;
  other[48] = 0x3f;  // gfx90a
  EXPECT_NE(error_of(other).find("expected gfx942"), std::string::npos);
  // Cut anywhere, or with any byte changed: an error or a load, never a crash.
  for (size_t bytes = 0; bytes < good.size(); bytes += 37) error_of(good.substr(0, bytes));
  dsv4::testing::Random random(8);
  for (int i = 0; i < 2000; ++i) {
    std::string changed = good;
    changed[static_cast<size_t>(random.below(static_cast<int64_t>(good.size())))] =
        static_cast<char>(random.bits());
    error_of(changed);
  }
  EXPECT_THROW(CodeObject::load("/no/such/file.co"), Error);
}

}  // namespace
}  // namespace dsv4::amd::isa
