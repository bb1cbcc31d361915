// What a kernel may touch: registered buffers with bounds, and a workgroup's local memory with a
// record of who touched what between two barriers.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace dsv4::amd::isa {

/// A fault of the executed program, thrown where it is found; Machine adds kernel, wave and
/// instruction and rethrows it as dsv4::Error.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Flat addresses of local and of private memory; no host address has these upper words.
inline constexpr uint64_t kSharedAperture = uint64_t{0x10000} << 32;
inline constexpr uint64_t kPrivateAperture = uint64_t{0x20000} << 32;

struct Region {
  uint64_t begin = 0, end = 0;
  bool writable = false;
  std::string name;
};

/// Buffers of global memory; addresses are host addresses.
class GlobalMemory {
 public:
  /// Throws dsv4::Error (kInvalidArgument) when the range is empty or overlaps another one.
  void add(const void* data, uint64_t bytes, bool writable, std::string name);
  void remove(const void* data);
  void clear() { regions_.clear(); }
  /// The region that holds all of [address, address + bytes), or null.
  const Region* find(uint64_t address, uint64_t bytes) const;
  /// Why [address, address + bytes) is not accessible, with the nearest buffer.
  std::string explain(uint64_t address, uint64_t bytes, bool write) const;

 private:
  std::vector<Region> regions_;  // ascending, disjoint
};

/// Local memory of a workgroup. Poisoned at the start with 0xff: NaN in every float format, -1 as
/// an index.
class LocalMemory {
 public:
  void reset(uint32_t bytes, bool check_races);
  uint32_t bytes() const { return bytes_; }
  /// Address of [offset, offset + bytes) for a read, a write or an atomic operation of `wave`.
  uint8_t* read(uint32_t offset, uint32_t bytes, int wave) {
    bound(offset, bytes);
    if (check_races_) note_read(offset, bytes, wave);
    return data_.data() + offset;
  }
  uint8_t* write(uint32_t offset, uint32_t bytes, int wave) {
    bound(offset, bytes);
    if (check_races_) note_write(offset, bytes, wave);
    return data_.data() + offset;
  }
  uint8_t* atomic(uint32_t offset, uint32_t bytes) {
    bound(offset, bytes);
    return data_.data() + offset;
  }
  /// All waves have met at a barrier.
  void barrier();

 private:
  void bound(uint32_t offset, uint32_t bytes) const {
    if (static_cast<uint64_t>(offset) + bytes > bytes_) out_of_bounds(offset, bytes);
  }
  [[noreturn]] void out_of_bounds(uint32_t offset, uint32_t bytes) const;
  [[noreturn]] void race(uint32_t offset, const char* what, int first, int second) const;
  void note_read(uint32_t offset, uint32_t bytes, int wave);
  void note_write(uint32_t offset, uint32_t bytes, int wave);

  std::vector<uint8_t> data_;
  // Per byte: barrier interval * 32 + wave of the last write and of the last read; a byte that
  // several waves read in one interval has kSeveral as its wave. 0: never.
  std::vector<uint16_t> writer_, reader_;
  uint32_t bytes_ = 0;
  uint16_t interval_ = 1;
  bool check_races_ = false;
};

}  // namespace dsv4::amd::isa
