// Branches, EXEC, barriers, the program counter, and instructions that do nothing here.
#include "backends/amd/isa/scalar_op.h"

namespace dsv4::amd::isa {
namespace {

using u64 = uint64_t;

template <bool (*kCondition)(const Wave&)>
void branch(Wave& wave, const Instruction& i) {
  if (kCondition(wave)) wave.next = i.target;
}
bool always(const Wave&) {
  return true;
}
bool scc_clear(const Wave& w) {
  return !w.scc;
}
bool scc_set(const Wave& w) {
  return w.scc;
}
bool vcc_zero(const Wave& w) {
  return w.vcc() == 0;
}
bool vcc_not_zero(const Wave& w) {
  return w.vcc() != 0;
}
bool exec_zero(const Wave& w) {
  return w.exec() == 0;
}
bool exec_not_zero(const Wave& w) {
  return w.exec() != 0;
}

// dst = EXEC; EXEC = f(source, EXEC); SCC: some lane is left.
template <typename F>
void save_exec(Wave& wave, const Instruction& i) {
  const u64 source = scalar_value64(wave, i.src[0]), exec = wave.exec();
  wave.set_scalar64(i.dst.reg, exec);
  wave.set_exec(F{}(source, exec));
  wave.scc = wave.exec() != 0;
}
// EXEC = f(source, EXEC), and the same into dst.
template <typename F>
void write_exec(Wave& wave, const Instruction& i) {
  wave.set_exec(F{}(scalar_value64(wave, i.src[0]), wave.exec()));
  wave.set_scalar64(i.dst.reg, wave.exec());
  wave.scc = wave.exec() != 0;
}

void jump(Wave& wave, u64 address) {
  const Workgroup& group = *wave.group;
  const int32_t index = group.find_code(group.program, address - group.image_base);
  if (index < 0) throw Fault("jump to an address without an instruction");
  wave.next = index;
}
void get_pc(Wave& wave, const Instruction& i) {
  wave.set_scalar64(i.dst.reg, wave.group->image_base + i.next_address);
}
void set_pc(Wave& wave, const Instruction& i) {
  jump(wave, scalar_value64(wave, i.src[0]));
}
void swap_pc(Wave& wave, const Instruction& i) {
  const u64 target = scalar_value64(wave, i.src[0]);
  get_pc(wave, i);
  jump(wave, target);
}

void barrier(Wave& wave, const Instruction&) {
  wave.state = WaveState::kAtBarrier;
}
void end(Wave& wave, const Instruction&) {
  wave.state = WaveState::kDone;
}
void trap(Wave&, const Instruction&) {
  throw Fault("the kernel executed a trap");
}
void nothing(Wave&, const Instruction&) {}
// Time is the number of instructions.
void read_time(Wave& wave, const Instruction& i) {
  wave.set_scalar64(i.dst.reg, wave.num_instructions);
}

Opcode make(Execute execute, std::vector<OperandType> dst, std::vector<OperandType> src) {
  Opcode out;
  out.execute = execute;
  out.dst = std::move(dst);
  out.src = std::move(src);
  return out;
}
template <typename F>
Opcode saving(F) {
  return make(save_exec<F>, {OperandType::kU64}, {OperandType::kU64});
}
template <typename F>
Opcode writing(F) {
  return make(write_exec<F>, {OperandType::kU64}, {OperandType::kU64});
}

}  // namespace

void add_scalar_control(OpcodeTable& t) {
  using enum OperandType;
  t["s_branch"] = make(branch<always>, {}, {kImmediate});
  t["s_cbranch_scc0"] = make(branch<scc_clear>, {}, {kImmediate});
  t["s_cbranch_scc1"] = make(branch<scc_set>, {}, {kImmediate});
  t["s_cbranch_vccz"] = make(branch<vcc_zero>, {}, {kImmediate});
  t["s_cbranch_vccnz"] = make(branch<vcc_not_zero>, {}, {kImmediate});
  t["s_cbranch_execz"] = make(branch<exec_zero>, {}, {kImmediate});
  t["s_cbranch_execnz"] = make(branch<exec_not_zero>, {}, {kImmediate});

  t["s_and_saveexec_b64"] = saving([](u64 s, u64 exec) { return s & exec; });
  t["s_or_saveexec_b64"] = saving([](u64 s, u64 exec) { return s | exec; });
  t["s_xor_saveexec_b64"] = saving([](u64 s, u64 exec) { return s ^ exec; });
  t["s_andn2_saveexec_b64"] = saving([](u64 s, u64 exec) { return s & ~exec; });
  t["s_orn2_saveexec_b64"] = saving([](u64 s, u64 exec) { return s | ~exec; });
  t["s_nand_saveexec_b64"] = saving([](u64 s, u64 exec) { return ~(s & exec); });
  t["s_nor_saveexec_b64"] = saving([](u64 s, u64 exec) { return ~(s | exec); });
  t["s_xnor_saveexec_b64"] = saving([](u64 s, u64 exec) { return ~(s ^ exec); });
  t["s_andn1_saveexec_b64"] = saving([](u64 s, u64 exec) { return ~s & exec; });
  t["s_orn1_saveexec_b64"] = saving([](u64 s, u64 exec) { return ~s | exec; });
  t["s_andn1_wrexec_b64"] = writing([](u64 s, u64 exec) { return ~s & exec; });
  t["s_andn2_wrexec_b64"] = writing([](u64 s, u64 exec) { return s & ~exec; });

  t["s_getpc_b64"] = make(get_pc, {kU64}, {});
  t["s_setpc_b64"] = make(set_pc, {}, {kU64});
  t["s_swappc_b64"] = make(swap_pc, {kU64}, {kU64});
  t["s_barrier"] = make(barrier, {}, {});
  t["s_endpgm"] = make(end, {}, {});
  t["s_trap"] = make(trap, {}, {kImmediate});
  t["s_memtime"] = t["s_memrealtime"] = make(read_time, {kU64}, {});

  // Ordering, priorities and caches: every access is complete before the next instruction here.
  for (const char* name : {"s_nop",        "s_waitcnt",        "s_waitcnt_vscnt",    "s_setprio",
                           "s_sleep",      "s_sethalt",        "s_icache_inv",       "s_dcache_inv",
                           "s_dcache_wb",  "s_dcache_inv_vol", "s_dcache_wb_vol",    "s_code_end",
                           "s_ttracedata", "s_incperflevel",   "s_decperflevel",     "buffer_inv",
                           "buffer_wbl2",  "buffer_wbinvl1",   "buffer_wbinvl1_vol", "v_nop"}) {
    t[name] = make(nothing, {}, {});
    t[name].any_operands = true;
  }
}

}  // namespace dsv4::amd::isa
