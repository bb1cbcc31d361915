#include "backends/amd/isa/machine.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "backends/amd/isa/wave.h"
#include "core/fail.h"
#include "core/thread_pool.h"

namespace dsv4::amd::isa {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint32_t kMaxWorkgroupSize = 1024;

// Bits of the kernel descriptor.
constexpr int kUserRegsPrivateBuffer = 4, kUserRegsPointer = 2;
constexpr uint16_t kPropertyKernarg = 1 << 3;
constexpr uint32_t kFloatModeAllDenormals = 0xf0;

struct Launch {
  const CodeObject& code;
  const KernelInfo& kernel;
  const GlobalMemory& memory;
  Dim3 grid, block;
  const LaunchOptions& options;
  uint64_t kernarg = 0, image_base = 0;
  uint32_t lds_bytes = 0;
  int32_t entry = 0;
  int num_waves = 0;
};

int32_t find_code(const void* program, uint64_t address) {
  return static_cast<const Program*>(program)->find(address);
}

// One workgroup at a time; keeps its memory for the next.
class WorkgroupRunner {
 public:
  explicit WorkgroupRunner(const Launch& launch) : launch_(launch) {
    const size_t waves = static_cast<size_t>(launch.num_waves);
    registers_ = std::make_unique<Row[]>(waves * kMaxVectorRegs);
    waves_.reserve(waves);
    for (size_t w = 0; w < waves; ++w) waves_.emplace_back(&registers_[w * kMaxVectorRegs]);
    group_.arch = launch.code.arch();
    group_.global = &launch.memory;
    group_.image_base = launch.image_base;
    group_.find_code = find_code;
    group_.program = &launch.code.program();
    if (launch.options.count_mnemonics) counts_.resize(launch.code.program().code().size());
  }

  void run(uint64_t workgroup) {
    id_ = {static_cast<uint32_t>(workgroup % launch_.grid.x),
           static_cast<uint32_t>(workgroup / launch_.grid.x % launch_.grid.y),
           static_cast<uint32_t>(workgroup / launch_.grid.x / launch_.grid.y)};
    group_.lds.reset(launch_.lds_bytes, launch_.options.check_races);
    for (int w = 0; w < launch_.num_waves; ++w) start(waves_[static_cast<size_t>(w)], w);
    while (run_to_barrier()) group_.lds.barrier();
    for (const Wave& wave : waves_) instructions_ += wave.num_instructions;
  }

  uint64_t instructions() const { return instructions_; }
  const std::vector<uint64_t>& counts() const { return counts_; }

 private:
  // Registers as the ABI for HSA says; everything else is poison.
  void start(Wave& wave, int wave_idx) {
    const KernelInfo& kernel = launch_.kernel;
    const uint32_t vgprs = std::min<uint32_t>(kernel.accum_offset(), kFirstAccRegister);
    std::fill_n(&wave.vector[0][0], static_cast<size_t>(vgprs) * kWaveSize, kVectorPoison);
    std::fill_n(&wave.vector[kFirstAccRegister][0],
                static_cast<size_t>(kernel.num_agprs) * kWaveSize, kVectorPoison);
    std::fill(std::begin(wave.scalar), std::end(wave.scalar), kScalarPoison);
    wave.group = &group_;
    wave.wave_idx = wave_idx;
    wave.state = WaveState::kRunning;
    wave.scc = false;
    wave.next = launch_.entry;
    wave.num_instructions = 0;
    wave.last_region = nullptr;
    wave.gpr_index_mode = 0;

    int reg = (kernel.properties & 1) != 0 ? kUserRegsPrivateBuffer : 0;
    for (int bit = 1; bit < 3; ++bit)
      reg += (kernel.properties >> bit & 1) != 0 ? kUserRegsPointer : 0;
    if ((kernel.properties & kPropertyKernarg) != 0) wave.set_scalar64(reg, launch_.kernarg);
    reg = static_cast<int>(kernel.resources2 >> 1 & 0x1f);
    if ((kernel.resources2 >> 7 & 1) != 0) wave.scalar[reg++] = id_.x;
    if ((kernel.resources2 >> 8 & 1) != 0) wave.scalar[reg++] = id_.y;
    if ((kernel.resources2 >> 9 & 1) != 0) wave.scalar[reg++] = id_.z;

    // Work-item numbers share v0: x in bits 0-9, y in 10-19, z in 20-29.
    const uint32_t dimensions = kernel.resources2 >> 11 & 3;
    const Dim3& block = launch_.block;
    const uint32_t threads = block.x * block.y * block.z;
    uint64_t exec = 0;
    for (uint32_t lane = 0; lane < kWaveSize; ++lane) {
      const uint32_t thread = static_cast<uint32_t>(wave_idx) * kWaveSize + lane;
      if (thread >= threads) break;
      exec |= uint64_t{1} << lane;
      uint32_t packed = thread % block.x;
      if (dimensions >= 1) packed |= thread / block.x % block.y << 10;
      if (dimensions >= 2) packed |= thread / block.x / block.y << 20;
      wave.vector[0][lane] = packed;
    }
    wave.set_exec(exec);
  }

  // Runs every wave until it waits or ends. False when all have ended.
  bool run_to_barrier() {
    bool waiting = false;
    for (int k = 0; k < launch_.num_waves; ++k) {
      const bool forward = launch_.options.order == WaveOrder::kForward;
      Wave& wave = waves_[static_cast<size_t>(forward ? k : launch_.num_waves - 1 - k)];
      if (wave.state == WaveState::kDone) continue;
      wave.state = WaveState::kRunning;
      run_wave(wave);
      waiting |= wave.state == WaveState::kAtBarrier;
    }
    return waiting;
  }

  void run_wave(Wave& wave) {
    const std::vector<Instruction>& code = launch_.code.program().code();
    const uint64_t limit = launch_.options.max_wave_instructions;
    const Instruction* current = nullptr;
    try {
      while (wave.state == WaveState::kRunning) {
        if (static_cast<size_t>(wave.next) >= code.size())
          throw Fault("execution ran past the end of the code");
        current = &code[static_cast<size_t>(wave.next++)];
        current->execute(wave, *current);
        if (!counts_.empty()) ++counts_[static_cast<size_t>(current->index)];
        if (++wave.num_instructions > limit)
          throw Fault(concat("more than ", limit, " instructions: does it end?"));
        if (wave.state == WaveState::kAtBarrier &&
            current->address == launch_.options.dropped_barrier)
          wave.state = WaveState::kRunning;
      }
    } catch (const Fault& fault) {
      report(wave, current, fault.what());
    }
  }

  [[noreturn]] void report(const Wave& wave, const Instruction* i, std::string reason) const {
    ErrorCode code = ErrorCode::kDeviceError;
    std::string where = "no instruction";
    if (i != nullptr) {
      const Program& program = launch_.code.program();
      std::ostringstream address;
      address << std::hex << i->address;
      where = concat("`", program.listed(*i).text, "` at 0x", address.str());
      if (!program.problem(i->index).empty()) {
        code = ErrorCode::kUnsupported;
        reason = program.problem(i->index);
      }
    }
    fail(code, "kernel ", launch_.kernel.name, " (", arch_name(launch_.code.arch()),
         "), workgroup (", id_.x, ", ", id_.y, ", ", id_.z, "), wave ", wave.wave_idx, ": ", where,
         ": ", reason);
  }

  const Launch& launch_;
  std::unique_ptr<Row[]> registers_;
  std::vector<Wave> waves_;
  Workgroup group_;
  Dim3 id_;
  uint64_t instructions_ = 0;
  std::vector<uint64_t> counts_;  // of every instruction of the listing
};

// A register beyond those that the kernel allocates belongs to another wave on a device.
void check_registers(const Program& program, const KernelInfo& kernel) {
  const uint32_t vgprs = std::min<uint32_t>(kernel.accum_offset(), kFirstAccRegister);
  const auto check = [&](const Instruction& i, const Operand& operand) {
    if (operand.kind != OperandKind::kVector) return;
    const bool acc = operand.reg >= kFirstAccRegister;
    const uint32_t last = operand.reg - (acc ? kFirstAccRegister : 0) + operand.num_regs;
    const uint32_t limit = acc ? kernel.num_agprs : vgprs;
    if (last > limit) {
      fail(ErrorCode::kDataCorrupt, "kernel ", kernel.name, ": `", program.listed(i).text,
           "` uses register ", last - 1, " of ", limit, acc ? " AGPRs" : " VGPRs");
    }
  };
  for (int32_t index = program.find(kernel.begin);
       index >= 0 && static_cast<size_t>(index) < program.code().size(); ++index) {
    const Instruction& i = program.code()[static_cast<size_t>(index)];
    if (i.address >= kernel.end) break;
    check(i, i.dst);
    check(i, i.dst2);
    for (int k = 0; k < i.num_src; ++k) check(i, i.src[static_cast<size_t>(k)]);
  }
}

void check_launch(const Launch& launch, size_t kernarg_bytes) {
  const KernelInfo& kernel = launch.kernel;
  const auto refuse = [&](const auto&... parts) {
    fail(ErrorCode::kInvalidArgument, "kernel ", kernel.name, ": ", parts...);
  };
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t limit = std::min(kernel.max_workgroup_size, kMaxWorkgroupSize);
  if (threads == 0 || threads > limit)
    refuse("workgroup of ", threads, " threads, expected 1 to ", limit);
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) refuse("the grid is empty");
  if (kernarg_bytes < kernel.explicit_bytes() ||
      kernarg_bytes > (kernel.explicit_bytes() + 7u) / 8 * 8) {
    refuse(kernarg_bytes, " bytes of arguments, expected ", kernel.explicit_bytes());
  }
  if (launch.lds_bytes > lds_limit_bytes(launch.code.arch())) {
    refuse(launch.lds_bytes, " bytes of LDS, ", arch_name(launch.code.arch()), " has ",
           lds_limit_bytes(launch.code.arch()));
  }
  if (launch.options.num_threads < 1)
    refuse("num_threads is ", launch.options.num_threads, ", expected at least 1");
  if (launch.entry < 0) refuse("the listing has no instruction at its entry");
  if ((kernel.preload & 0x7f) != 0) {
    fail(ErrorCode::kUnsupported, "kernel ", kernel.name, ": preloaded arguments are not modelled");
  }
  if ((kernel.resources1 >> 12 & 0xff) != kFloatModeAllDenormals) {
    fail(ErrorCode::kUnsupported, "kernel ", kernel.name,
         ": float mode is not round-to-nearest with denormals, others are not modelled");
  }
}

// Explicit arguments, then the hidden ones that tell a kernel its launch.
std::vector<std::byte> full_kernarg(const Launch& launch, std::span<const std::byte> arguments) {
  std::vector<std::byte> out(std::max<size_t>({launch.kernel.kernarg_bytes, arguments.size(), 8}));
  std::copy(arguments.begin(), arguments.end(), out.begin());
  const Dim3 &grid = launch.grid, &block = launch.block;
  const std::pair<const char*, uint32_t> values[] = {
      {"hidden_block_count_x", grid.x},
      {"hidden_block_count_y", grid.y},
      {"hidden_block_count_z", grid.z},
      {"hidden_group_size_x", block.x},
      {"hidden_group_size_y", block.y},
      {"hidden_group_size_z", block.z},
      {"hidden_dynamic_lds_size", launch.options.dynamic_lds_bytes},
      {"hidden_grid_dims", grid.z * block.z > 1   ? 3u
                           : grid.y * block.y > 1 ? 2u
                                                  : 1u}};
  for (const KernelArgument& argument : launch.kernel.arguments) {
    for (const auto& [kind, value] : values) {
      if (argument.kind != kind || argument.size > 4 ||
          argument.offset + argument.size > out.size())
        continue;
      std::memcpy(out.data() + argument.offset, &value, argument.size);
    }
  }
  return out;
}

}  // namespace

Machine::Machine(CodeObject code) : code_(std::move(code)) {
  load_image();
}

void Machine::load_image() {
  uint64_t end = kPage;
  for (const Segment& segment : code_.segments())
    end = std::max(end, segment.address + segment.memory_bytes);
  image_storage_ = std::make_unique<std::byte[]>(end + kPage);
  image_base_ = (reinterpret_cast<uint64_t>(image_storage_.get()) + kPage - 1) / kPage * kPage;
  std::byte* const base =
      image_storage_.get() + (image_base_ - reinterpret_cast<uint64_t>(image_storage_.get()));
  for (const Segment& segment : code_.segments()) {
    std::memcpy(base + segment.address, code_.bytes().data() + segment.file_offset,
                segment.file_bytes);
  }
  for (const Relocation& relocation : code_.relocations()) {
    if (relocation.address + 8 > end)
      fail(ErrorCode::kDataCorrupt, "code object: relocation outside of the image");
    const uint64_t value = image_base_ + relocation.addend;
    std::memcpy(base + relocation.address, &value, 8);
  }
  clear_buffers();
}

void Machine::clear_buffers() {
  memory_.clear();
  for (const Segment& segment : code_.segments()) {
    memory_.add(reinterpret_cast<const void*>(image_base_ + segment.address), segment.memory_bytes,
                segment.writable, "code object");
  }
}

void Machine::add_buffer(void* data, uint64_t bytes, std::string name) {
  memory_.add(data, bytes, true, std::move(name));
}
void Machine::add_read_only_buffer(const void* data, uint64_t bytes, std::string name) {
  memory_.add(data, bytes, false, std::move(name));
}

RunResult Machine::run(const std::string& kernel_name, Dim3 grid, Dim3 block,
                       std::span<const std::byte> arguments, const LaunchOptions& options) {
  const KernelInfo& kernel = code_.kernel(kernel_name);
  GlobalMemory memory = memory_;
  Launch launch{code_, kernel, memory, grid, block, options};
  launch.image_base = image_base_;
  launch.lds_bytes = kernel.lds_bytes + options.dynamic_lds_bytes;
  launch.entry = code_.program().find(kernel.begin);
  launch.num_waves = static_cast<int>((block.x * block.y * block.z + kWaveSize - 1) / kWaveSize);
  check_launch(launch, arguments.size());
  check_registers(code_.program(), kernel);
  const std::vector<std::byte> kernarg = full_kernarg(launch, arguments);
  memory.add(kernarg.data(), kernarg.size(), false, "kernel arguments");
  launch.kernarg = reinterpret_cast<uint64_t>(kernarg.data());

  const uint64_t workgroups = uint64_t{grid.x} * grid.y * grid.z;
  const int threads =
      static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(options.num_threads), workgroups));
  std::vector<std::unique_ptr<WorkgroupRunner>> runners;
  for (int t = 0; t < threads; ++t) runners.push_back(std::make_unique<WorkgroupRunner>(launch));
  if (threads == 1) {
    for (uint64_t g = 0; g < workgroups; ++g) runners[0]->run(g);
  } else {
    // Chunks of workgroups: a pool takes a bounded number of them.
    constexpr uint64_t kChunks = 1 << 12;
    const uint64_t per_chunk = (workgroups + kChunks - 1) / kChunks;
    ThreadPool pool(threads);
    pool.run_with_thread(static_cast<int64_t>((workgroups + per_chunk - 1) / per_chunk),
                         [&](int64_t chunk, int thread) {
                           const uint64_t first = static_cast<uint64_t>(chunk) * per_chunk;
                           for (uint64_t g = first; g < std::min(first + per_chunk, workgroups);
                                ++g) {
                             runners[static_cast<size_t>(thread)]->run(g);
                           }
                         });
  }

  RunResult out;
  for (const auto& runner : runners) {
    out.wave_instructions += runner->instructions();
    for (size_t k = 0; k < runner->counts().size(); ++k) {
      if (runner->counts()[k] != 0) {
        out.mnemonics[code_.program().listed(code_.program().code()[k]).mnemonic] +=
            runner->counts()[k];
      }
    }
  }
  return out;
}

}  // namespace dsv4::amd::isa
