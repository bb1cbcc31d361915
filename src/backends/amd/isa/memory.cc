#include "backends/amd/isa/memory.h"

#include <algorithm>
#include <ios>

#include "core/fail.h"

namespace dsv4::amd::isa {
namespace {

constexpr uint16_t kWaves = 32;
constexpr uint16_t kSeveral = kWaves - 1;
constexpr uint16_t kLastInterval = 0xffff / kWaves;

std::string hex(uint64_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << value;
  return out.str();
}

}  // namespace

void GlobalMemory::add(const void* data, uint64_t bytes, bool writable, std::string name) {
  const uint64_t begin = reinterpret_cast<uint64_t>(data);
  if (data == nullptr || bytes == 0) {
    fail(ErrorCode::kInvalidArgument, "buffer ", name, ": no memory (", bytes, " bytes)");
  }
  const auto next = std::find_if(regions_.begin(), regions_.end(),
                                 [&](const Region& r) { return r.end > begin; });
  if (next != regions_.end() && next->begin < begin + bytes) {
    fail(ErrorCode::kInvalidArgument, "buffer ", name, " overlaps buffer ", next->name);
  }
  regions_.insert(next, Region{begin, begin + bytes, writable, std::move(name)});
}

void GlobalMemory::remove(const void* data) {
  std::erase_if(regions_,
                [&](const Region& r) { return r.begin == reinterpret_cast<uint64_t>(data); });
}

const Region* GlobalMemory::find(uint64_t address, uint64_t bytes) const {
  const auto next = std::upper_bound(regions_.begin(), regions_.end(), address,
                                     [](uint64_t a, const Region& r) { return a < r.end; });
  if (next == regions_.end() || address < next->begin || bytes > next->end - address)
    return nullptr;
  return &*next;
}

std::string GlobalMemory::explain(uint64_t address, uint64_t bytes, bool write) const {
  if (const Region* region = find(address, bytes); region != nullptr) {
    return concat(write ? "write to" : "access to", " read-only buffer ", region->name, " at byte ",
                  address - region->begin);
  }
  std::string out = concat("out-of-bounds ", write ? "write" : "read", " of ", bytes,
                           " bytes at address ", hex(address));
  const Region* nearest = nullptr;
  uint64_t distance = 0;
  for (const Region& region : regions_) {
    const uint64_t gap = address < region.begin  ? region.begin - address
                         : address >= region.end ? address - region.end
                                                 : 0;
    if (nearest == nullptr || gap < distance) nearest = &region, distance = gap;
  }
  if (nearest == nullptr) return out + "; no buffers are registered";
  return concat(out, "; nearest buffer is ", nearest->name, " [", hex(nearest->begin), ", ",
                hex(nearest->end), "), byte ", static_cast<int64_t>(address - nearest->begin),
                " of ", nearest->end - nearest->begin);
}

void LocalMemory::reset(uint32_t bytes, bool check_races) {
  bytes_ = bytes;
  check_races_ = check_races;
  interval_ = 1;
  data_.assign(bytes, 0xff);
  if (check_races) {
    writer_.assign(bytes, 0);
    reader_.assign(bytes, 0);
  }
}

void LocalMemory::barrier() {
  if (++interval_ < kLastInterval) return;
  interval_ = 1;
  std::fill(writer_.begin(), writer_.end(), uint16_t{0});
  std::fill(reader_.begin(), reader_.end(), uint16_t{0});
}

void LocalMemory::out_of_bounds(uint32_t offset, uint32_t bytes) const {
  throw Fault(concat("out-of-bounds LDS access of ", bytes, " bytes at ", offset,
                     "; the workgroup has ", bytes_, " bytes"));
}

void LocalMemory::race(uint32_t offset, const char* what, int first, int second) const {
  const std::string other = first == kSeveral ? "other waves" : concat("wave ", first);
  throw Fault(concat("LDS race: ", what, " at byte ", offset, " without a barrier between ", other,
                     " and wave ", second));
}

void LocalMemory::note_read(uint32_t offset, uint32_t bytes, int wave) {
  const uint16_t mine = static_cast<uint16_t>(interval_ * kWaves + wave);
  const uint16_t first = static_cast<uint16_t>(interval_ * kWaves);
  uint16_t* const writer = writer_.data() + offset;
  uint16_t* const reader = reader_.data() + offset;
  for (uint32_t i = 0; i < bytes; ++i) {
    if (writer[i] >= first && writer[i] != mine) {
      race(offset + i, "read after write", writer[i] % kWaves, wave);
    }
    const bool others = reader[i] >= first && reader[i] != mine;
    reader[i] = others ? static_cast<uint16_t>(first + kSeveral) : mine;
  }
}

void LocalMemory::note_write(uint32_t offset, uint32_t bytes, int wave) {
  const uint16_t mine = static_cast<uint16_t>(interval_ * kWaves + wave);
  const uint16_t first = static_cast<uint16_t>(interval_ * kWaves);
  uint16_t* const writer = writer_.data() + offset;
  const uint16_t* const reader = reader_.data() + offset;
  for (uint32_t i = 0; i < bytes; ++i) {
    if (writer[i] >= first && writer[i] != mine) {
      race(offset + i, "two writes", writer[i] % kWaves, wave);
    }
    if (reader[i] >= first && reader[i] != mine) {
      race(offset + i, "write after read", reader[i] % kWaves, wave);
    }
    writer[i] = mine;
  }
}

}  // namespace dsv4::amd::isa
