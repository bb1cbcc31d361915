// Paged KV caches: row formats, what a layer declares, what a kernel sees, and the pool that owns
// the bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/device.h"

namespace dsv4 {

/// Byte-exact row formats. Source: spec/cache_layouts.md.
enum class KvFormat : uint8_t {
  kFp8DsMla,    ///< 584 B a row: 448 E4M3 + 64 bf16, 7 UE8M0 scales + 1 zero byte at the end of the
                ///< block
  kBf16,        ///< head_dim bf16
  kFp8,         ///< head_dim E4M3, one scale per cache (1.0)
  kF32,         ///< head_dim float, for `exact`
  kIndexFp8,    ///< 128 E4M3, then per block one float scale a row
  kIndexMxfp4,  ///< 64 bytes of E2M1 pairs, then per block 4 UE8M0 bytes a row
  kIndexF32,    ///< index_head_dim float, for `exact`
  kStateF32,    ///< compressor state: [v | s], 2 * coff * width floats
};
/// "fp8_ds_mla", "bf16", "fp8", "f32", "index_fp8", ...
const char* kv_format_name(KvFormat format);
/// Row formats of --kv-cache-dtype ("fp8_ds_mla", "bf16", "fp8", "f32"); nullopt for another word.
std::optional<KvFormat> parse_kv_format(std::string_view name);

enum class CacheRole : uint8_t { kWindow, kCompressed, kIndex, kState, kIndexState };
const char* cache_role_name(CacheRole role);

/// One cache that a layer needs; declared by the layer, owned by the pool.
struct CacheSpec {
  CacheRole role;
  KvFormat format;
  int tokens_per_row;  ///< 1 for window and state rows, the compress ratio for compressed and index
                       ///< rows
  int keep_tokens;     ///< tokens that must stay readable; 0: grows with the sequence
  int row_elems;       ///< numbers in a row: 512, 128, or 2 * coff * width for state
};

/// All that a kernel sees of a paged cache. Rows of block b start at base + b * block_stride_bytes.
struct CacheView {
  std::byte* base = nullptr;
  int64_t block_stride_bytes = 0;
  int32_t num_blocks = 0;  ///< tables hold smaller ones: others are refused or read as zeros
  int32_t rows_per_block = 0;
  KvFormat format = KvFormat::kFp8DsMla;
  int32_t row_elems = 0;
  explicit operator bool() const { return base != nullptr; }
};

/// Compressor state: a ring of pooled_tokens rows per sequence; the row of position p is p %
/// ring_rows.
struct StateView {
  float* base = nullptr;
  int64_t slot_stride_elems = 0;  ///< floats from one sequence's ring to the next
  int32_t num_slots = 0;
  int32_t ring_rows = 0;
  int32_t row_elems = 0;  ///< [v (coff*width) | s incl. ape (coff*width)]
  explicit operator bool() const { return base != nullptr; }
};

/// The caches of one layer; absent ones are empty views.
struct LayerCaches {
  CacheView window;
  CacheView compressed;
  CacheView index;
  StateView state;
  StateView index_state;
};

/// Bytes that one block of `rows` rows occupies (the page), without alignment of the stride.
int64_t page_bytes(KvFormat format, int64_t rows, int row_elems);

using SequenceId = int64_t;

/// New tokens of one sequence in a step; they follow the KvCachePool::length tokens that the
/// sequence has.
struct BatchEntry {
  SequenceId sequence;
  int32_t num_tokens;
};

struct PoolLimits {
  int64_t total_tokens = 0;  ///< tokens of all sequences: any max_seqs sequences with that many
                             ///< tokens in total fit (what blocks round up comes on top)
  int max_seqs = 1;
  int max_step_tokens =
      1;  ///< of all sequences in one step: window rows of a step are all live at once
  int window_block_tokens = 64;
  int growing_block_tokens = 256;  ///< multiple of every compress ratio
  int max_snapshots = 0;           ///< restore points held at the same time as max_seqs sequences
  uint64_t shuffle_seed = 0;  ///< 0: lowest free block first; else another fixed order, for tests
                              ///< that rename blocks
};

struct PoolUsage {
  int64_t bytes = 0;  ///< allocated, all groups
  int64_t growing_blocks = 0, growing_blocks_free = 0, growing_block_bytes = 0;
  int64_t window_blocks = 0, window_blocks_free = 0, window_block_bytes = 0;
  int64_t state_slots = 0, state_slots_free = 0, state_slot_bytes = 0;
  double growing_bytes_per_token = 0;
};

/// Owns the bytes of all caches of a model on one device. Three groups, each one slab of equal
/// blocks that span all layers: growing rows (compressed and index), window rows, state rings.
/// Pages start at multiples of 64 bytes. Memory is uninitialised (0xff in debug builds): kernels
/// read written rows only, and the compressor no state row of a position < 0, so a new sequence
/// needs no clearing. Copies of fork() and snapshot() run on the device's default stream; steps
/// must be ordered with it. Every function that takes a sequence @throws Error kInvalidArgument
/// when it is unknown or released. Thread-compatible.
class KvCachePool {
 public:
  /// `specs[layer]` as declared by the layers. @throws Error kInvalidArgument (limits, block
  /// sizes), kOutOfMemory.
  KvCachePool(std::vector<std::vector<CacheSpec>> specs, const PoolLimits& limits, Device& device);
  ~KvCachePool();
  KvCachePool(const KvCachePool&) = delete;
  KvCachePool& operator=(const KvCachePool&) = delete;

  /// What the constructor would allocate, without allocating.
  static PoolUsage plan(const std::vector<std::vector<CacheSpec>>& specs, const PoolLimits& limits);

  /// A new, empty sequence; nullopt when no state slot is free.
  std::optional<SequenceId> create();
  /// Makes room for `new_tokens` after length(sequence), and gives back what an earlier reservation
  /// holds beyond that. All or nothing: false when blocks ran out; the reservation stays as it was.
  /// Window blocks that no later token can see are given back first.
  bool reserve(SequenceId sequence, int64_t new_tokens);
  /// reserve() for every sequence of a step, all or nothing: after an error the sequences before
  /// the refused one hold no reservation.
  /// @throws Error kOutOfMemory naming the first sequence without room and the free blocks.
  void reserve_step(std::span<const BatchEntry> batch);
  /// Tells that the first `tokens` of the reserved ones have been written by a step.
  /// @throws Error kInvalidArgument when fewer are reserved.
  void advance(SequenceId sequence, int64_t tokens);
  /// Gives back everything that the sequence and its snapshots hold.
  void release(SequenceId sequence);
  /// A new sequence that shares the first `tokens` tokens: full blocks by reference, the partial
  /// ones and the state by copy. `tokens` must be the current length or that of a snapshot (state
  /// rings hold no older rows). nullopt when blocks or slots ran out. @throws Error
  /// kInvalidArgument naming the lengths that can be forked.
  std::optional<SequenceId> fork(SequenceId sequence, int64_t tokens);
  /// Keeps a restore point at the current length: a copy of the state, references to the window
  /// blocks. Released with the sequence; a second one at the same length changes nothing. False
  /// when no state slot is free.
  bool snapshot(SequenceId sequence);

  int64_t length(SequenceId sequence) const;
  int32_t state_slot(SequenceId sequence) const;
  /// Physical blocks of growing rows, in order. Spans are valid until the next change of the pool.
  std::span<const int32_t> growing_blocks(SequenceId sequence) const;
  /// Physical blocks of window rows; the first one holds token `first_token`, a multiple of
  /// window_block_tokens.
  struct WindowBlocks {
    int64_t first_token = 0;
    std::span<const int32_t> blocks;
  };
  WindowBlocks window_blocks(SequenceId sequence) const;

  const PoolLimits& limits() const;
  LayerCaches caches(int layer_idx) const;
  PoolUsage usage() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv4
