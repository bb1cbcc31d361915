// safetensors files: reading, writing, and headers that lie.
#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/checkpoint/files.h"

namespace dsv4::testing {
namespace {

TEST(Safetensors, ReadsWhatAnotherWriterWrote) {
  const TempDir dir;
  const std::string path = dir.file("a.safetensors");
  StoredTensors tensors;
  tensors["matrix"] = {
      "F32", {2, 3}, std::string("\0\0\x80\x3f\0\0\0\x40\0\0\x40\x40", 12) + std::string(12, '\0')};
  tensors["bytes"] = {"I8", {5}, "abcde"};
  tensors["scalar"] = {"I64", {}, std::string("\x2a\0\0\0\0\0\0\0", 8)};
  tensors["empty"] = {"BF16", {0, 7}, ""};
  write_tensors(path, tensors);
  const SafetensorsFile file(path);
  EXPECT_EQ(file.names(), (std::vector<std::string>{"bytes", "empty", "matrix", "scalar"}));
  const ConstTensor matrix = file.get("matrix");
  EXPECT_EQ(describe(matrix), "[2, 3] f32");
  EXPECT_TRUE(matrix.is_contiguous());
  EXPECT_EQ(matrix.as<float>()[0], 1.0f);
  EXPECT_EQ(matrix.as<float>()[2], 3.0f);
  // "bytes" comes first in the file: the float data is not aligned there.
  EXPECT_EQ(reinterpret_cast<uintptr_t>(matrix.data) % alignof(float), 0u);
  EXPECT_EQ(file.get("bytes").dtype, DType::kU8);
  EXPECT_EQ(file.stored_dtype("bytes"), "I8");
  EXPECT_EQ(file.get("scalar").rank, 0);
  EXPECT_EQ(*file.get("scalar").as<int64_t>(), 42);
  EXPECT_EQ(file.get("empty").num_bytes(), 0);
  expect_error(ErrorCode::kNotFound, {path, "'other'"}, [&] { file.get("other"); });
}

TEST(Safetensors, MetadataGapsAndTrailingSpacesAreAllowed) {
  const TempDir dir;
  const std::string path = dir.file("a.safetensors");
  write_file(path, raw_safetensors(R"({"__metadata__":{"format":"pt"},
      "a":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}    )",
                                   "....xy.."));
  const SafetensorsFile file(path);
  EXPECT_EQ(file.names(), std::vector<std::string>{"a"});
  EXPECT_EQ(bytes_of(file.get("a")), "xy");
}

TEST(Safetensors, ViewsSurviveAMove) {
  const TempDir dir;
  const std::string path = dir.file("a.safetensors");
  write_tensors(path, {{"a", {"U8", {3}, "xyz"}}});
  SafetensorsFile first(path);
  const ConstTensor view = first.get("a");
  const SafetensorsFile second(std::move(first));
  EXPECT_EQ(view.data, second.get("a").data);
  EXPECT_EQ(bytes_of(view), "xyz");
}

TEST(Safetensors, TypesThatNothingReadsAreRefusedWhenAskedFor) {
  const TempDir dir;
  const std::string path = dir.file("a.safetensors");
  write_tensors(path, {{"good", {"U8", {1}, "x"}},
                       {"half", {"F16", {2}, "abcd"}},
                       {"deep", {"U8", {1, 1, 1, 1, 1}, "x"}}});
  const SafetensorsFile file(path);
  EXPECT_EQ(bytes_of(file.get("good")), "x");
  expect_error(ErrorCode::kUnsupported, {path, "'half'", "BF16", "given F16"},
               [&] { file.get("half"); });
  expect_error(ErrorCode::kUnsupported, {path, "'deep'", "rank", "given 5"},
               [&] { file.get("deep"); });
}

TEST(Safetensors, RoundTripOfEveryType) {
  const TempDir dir;
  const std::string path = dir.file("out.safetensors");
  const std::vector<float> floats = {1, 2, 3, -0.0f, 5, 6};
  const std::vector<int64_t> longs = {-1, std::numeric_limits<int64_t>::max()};
  const std::string bytes = "abcdefgh";
  std::vector<std::pair<std::string, ConstTensor>> tensors;
  // Odd sizes first: the writer has to keep the wide ones aligned.
  tensors.emplace_back("u8", ConstTensor(bytes.data(), DType::kU8, {7}));
  tensors.emplace_back("fp8", ConstTensor(bytes.data(), DType::kF8E4M3, {1, 3}));
  tensors.emplace_back("fp4", ConstTensor(bytes.data(), DType::kF4E2M1, {3, 1}));
  tensors.emplace_back("e8m0", ConstTensor(bytes.data(), DType::kF8E8M0, {5}));
  tensors.emplace_back("bf16", ConstTensor(bytes.data(), DType::kBf16, {3}));
  tensors.emplace_back("f32", ConstTensor(floats.data(), DType::kF32, {3, 2}));
  tensors.emplace_back("i32", ConstTensor(floats.data(), DType::kI32, {1}));
  tensors.emplace_back("i64", ConstTensor(longs.data(), DType::kI64, {2}));
  tensors.emplace_back("scalar", ConstTensor(floats.data() + 4, DType::kF32, {}));
  tensors.emplace_back("nothing", ConstTensor(nullptr, DType::kF32, {0, 4}));
  tensors.emplace_back("name \"quoted\" \xc3\xa9", ConstTensor(bytes.data(), DType::kU8, {1}));
  write_safetensors(path, tensors);

  const SafetensorsFile file(path);
  EXPECT_EQ(file.names().size(), tensors.size());
  const std::string raw = read_file(path);
  for (const auto& [name, tensor] : tensors) {
    const ConstTensor back = file.get(name);
    const bool fp4 = tensor.dtype == DType::kF4E2M1;
    EXPECT_EQ(back.dtype, fp4 ? DType::kU8 : tensor.dtype) << name;
    EXPECT_EQ(file.stored_dtype(name), stored_dtype_name(tensor.dtype)) << name;
    EXPECT_EQ(back.rank, tensor.rank) << name;
    EXPECT_EQ(back.shape, tensor.shape) << name;
    ASSERT_EQ(back.num_bytes(), tensor.num_bytes()) << name;
    if (tensor.num_bytes() == 0) continue;
    EXPECT_EQ(bytes_of(back), bytes_of(tensor)) << name;
  }
  // Aligned within the file, so that nothing was copied at opening.
  uint64_t header_bytes;
  std::memcpy(&header_bytes, raw.data(), 8);
  EXPECT_EQ(header_bytes % 8, 0u);
  const auto header = nlohmann::json::parse(raw.substr(8, header_bytes));
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(header[name]["data_offsets"][0].get<int64_t>() % size_of(tensor.dtype), 0) << name;
  }
}

TEST(Safetensors, WriterReplacesWholeFilesOrNothing) {
  const TempDir dir;
  const std::string path = dir.file("out.safetensors");
  const ConstTensor tensor("xyz", DType::kU8, {3});
  write_safetensors(path, {{"a", tensor}});
  write_safetensors(path, {{"b", tensor}});
  EXPECT_EQ(SafetensorsFile(path).names(), std::vector<std::string>{"b"});
  expect_error(ErrorCode::kInvalidArgument, {path, "'c'", "twice"}, [&] {
    write_safetensors(path, {{"c", tensor}, {"c", tensor}});
  });
  EXPECT_EQ(SafetensorsFile(path).names(), std::vector<std::string>{"b"});
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1)
      << "a temporary file was left";
}

TEST(Safetensors, WriterNamesWhatItCannotWrite) {
  const TempDir dir;
  const std::string path = dir.file("out.safetensors");
  const std::vector<float> values(8);
  const ConstTensor matrix(values.data(), DType::kF32, {2, 4});
  ConstTensor columns = matrix;
  columns.shape[1] = 2;
  const ConstTensor none(nullptr, DType::kF32, {2});
  const auto refuse = [&](const std::string& name, const ConstTensor& tensor,
                          const std::string& part) {
    expect_error(ErrorCode::kInvalidArgument, {path, part}, [&] {
      write_safetensors(path, {{name, tensor}});
    });
  };
  refuse("columns", columns, "'columns'");
  refuse("none", none, "'none'");
  refuse("__metadata__", matrix, "'__metadata__'");
  refuse("\xff", matrix, "UTF-8");
  const std::string nowhere = dir.file("no/such/folder.safetensors");
  expect_error(ErrorCode::kInvalidArgument, {nowhere, "No such file"}, [&] {
    write_safetensors(nowhere, {{"a", matrix}});
  });
  expect_error(ErrorCode::kInvalidArgument, {dir.path()}, [&] {
    write_safetensors(dir.path(), {{"a", matrix}});
  });
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

// ---- files that lie ----

struct BadFile {
  const char* name;
  std::string bytes;
  ErrorCode code;
  std::vector<std::string> message;
};
class BadFileTest : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadFileTest, IsRefusedByName) {
  const TempDir dir;
  const std::string path = dir.file("bad.safetensors");
  write_file(path, GetParam().bytes);
  std::vector<std::string> parts = GetParam().message;
  parts.push_back(path);
  expect_error(GetParam().code, parts, [&] { SafetensorsFile{path}; });
}

std::string one_tensor(const std::string& description, const std::string& data = "12345678") {
  return raw_safetensors("{\"t\":" + description + "}", data);
}
std::string with_length(uint64_t length, const std::string& rest) {
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + rest;
}

constexpr ErrorCode kCorrupt = ErrorCode::kDataCorrupt;
const std::vector<BadFile> kBadFiles = {
    {"Empty", "", kCorrupt, {"at least 8 bytes", "given 0"}},
    {"SevenBytes", "1234567", kCorrupt, {"given 7"}},
    {"OnlyALength", with_length(2, ""), kCorrupt, {"header length", "given 2"}},
    {"HeaderBeyondFile", with_length(100, "{}"), kCorrupt, {"header length", "given 100"}},
    {"HugeHeader", with_length(~uint64_t{0}, "{}"), kCorrupt, {"given 18446744073709551615"}},
    {"NegativeHeader", with_length(uint64_t{1} << 63, "{}"), kCorrupt, {"header length"}},
    {"EmptyHeader", with_length(0, "{}"), kCorrupt, {"not valid JSON"}},
    {"HeaderIsList", raw_safetensors("[]", ""), kCorrupt, {"a JSON object"}},
    {"HeaderIsText", raw_safetensors("hello", ""), kCorrupt, {"not valid JSON"}},
    {"HeaderNotUtf8", raw_safetensors("{\"\xff\":1}", ""), kCorrupt, {"not valid JSON"}},
    {"HeaderTruncated", raw_safetensors("{\"t\":{", ""), kCorrupt, {"not valid JSON"}},
    {"DeepHeader", raw_safetensors(std::string(100000, '['), ""), kCorrupt, {"nested deeper"}},
    {"NameTwice",
     raw_safetensors(R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                         "t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                     "xy"),
     kCorrupt,
     {"'t' is given twice"}},
    {"DescriptionIsNumber", one_tensor("7"), kCorrupt, {"'t'", "description", "given 7"}},
    {"NoDtype", one_tensor(R"({"shape":[1],"data_offsets":[0,1]})"), kCorrupt, {"'t'", "dtype"}},
    {"NoShape", one_tensor(R"({"dtype":"U8","data_offsets":[0,1]})"), kCorrupt, {"'t'", "shape"}},
    {"NoOffsets", one_tensor(R"({"dtype":"U8","shape":[1]})"), kCorrupt, {"'t'", "data_offsets"}},
    {"DtypeIsNumber",
     one_tensor(R"({"dtype":8,"shape":[1],"data_offsets":[0,1]})"),
     kCorrupt,
     {"'t'", "dtype", "given 8"}},
    {"UnknownDtype",
     one_tensor(R"({"dtype":"F7","shape":[1],"data_offsets":[0,1]})"),
     ErrorCode::kUnsupported,
     {"'t'", "dtype", "\"F7\"", "BF16"}},
    {"ShapeIsNumber",
     one_tensor(R"({"dtype":"U8","shape":1,"data_offsets":[0,1]})"),
     kCorrupt,
     {"'t'", "shape", "given 1"}},
    {"NegativeExtent",
     one_tensor(R"({"dtype":"U8","shape":[-1],"data_offsets":[0,1]})"),
     kCorrupt,
     {"'t'", "shape", "[-1]"}},
    {"FractionalExtent",
     one_tensor(R"({"dtype":"U8","shape":[1.5],"data_offsets":[0,1]})"),
     kCorrupt,
     {"'t'", "shape", "[1.5]"}},
    {"ExtentBeyond63Bits",
     one_tensor(R"({"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]})"),
     kCorrupt,
     {"'t'", "shape"}},
    {"ProductOverflows",
     one_tensor(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})"),
     kCorrupt,
     {"'t'", "shape", "63 bits"}},
    {"BytesOverflow",
     one_tensor(R"({"dtype":"I64","shape":[2305843009213693952],"data_offsets":[0,0]})"),
     kCorrupt,
     {"'t'", "shape", "63 bits"}},
    {"OverflowHiddenByAZero",
     one_tensor(R"({"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],
                    "data_offsets":[0,0]})"),
     kCorrupt,
     {"'t'", "shape", "63 bits"}},
    {"SizeWrapsToZero",
     one_tensor(R"({"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]})"),
     kCorrupt,
     {"'t'", "shape"}},
    {"OffsetsAreNumber",
     one_tensor(R"({"dtype":"U8","shape":[1],"data_offsets":1})"),
     kCorrupt,
     {"'t'", "data_offsets"}},
    {"ThreeOffsets",
     one_tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1,2]})"),
     kCorrupt,
     {"'t'", "data_offsets", "[0,1,2]"}},
    {"NegativeOffset",
     one_tensor(R"({"dtype":"U8","shape":[2],"data_offsets":[-1,1]})"),
     kCorrupt,
     {"'t'", "data_offsets", "[-1,1]"}},
    {"OffsetsReversed",
     one_tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[2,1]})"),
     kCorrupt,
     {"'t'", "data_offsets", "[2,1]"}},
    {"OffsetsBeyondFile",
     one_tensor(R"({"dtype":"U8","shape":[9],"data_offsets":[0,9]})"),
     kCorrupt,
     {"'t'", "at most 8", "given 9", "truncated"}},
    {"SizeDiffersFromShape",
     one_tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})"),
     kCorrupt,
     {"'t'", "expected 8 bytes", "given 4"}},
    {"Overlap",
     raw_safetensors(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                         "b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})",
                     "12345678"),
     kCorrupt,
     {"'b'", "'a'", "overlap", "given 3"}},
    {"SameBytes",
     raw_safetensors(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                         "b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
                     "12345678"),
     kCorrupt,
     {"'a'", "'b'", "overlap"}},
};
INSTANTIATE_TEST_SUITE_P(Table, BadFileTest, ::testing::ValuesIn(kBadFiles),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Safetensors, MissingFileIsNamed) {
  expect_error(ErrorCode::kNotFound, {"/no/such/file.safetensors"},
               [] { SafetensorsFile{"/no/such/file.safetensors"}; });
}

TEST(Safetensors, EveryTruncationOfAFileIsRefused) {
  const TempDir dir;
  const std::string path = dir.file("a.safetensors");
  write_tensors(path, {{"a", {"U8", {3}, "xyz"}}, {"b", {"F32", {1}, "1234"}}});
  const std::string whole = read_file(path);
  for (size_t length = 0; length < whole.size(); ++length) {
    write_file(path, whole.substr(0, length));
    expect_error(kCorrupt, {path}, [&] { SafetensorsFile{path}; });
  }
}

}  // namespace
}  // namespace dsv4::testing
