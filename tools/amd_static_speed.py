#!/usr/bin/env python3
"""Static speed of compiled AMD kernels: registers, local memory, occupancy, instruction mix, and llvm-mca's cycles of the
hottest loop. No GPU is needed, and no time is predicted: numbers for comparing two versions of a kernel.

  tools/amd_static_speed.py build/hip/src/backends/amd/code_objects [--match 'QnormRopeInsert<Bf16'] [--chip gfx942]

The hot loop is the innermost loop with the most matrix instructions, then with the most instructions; a kernel without a
loop counts as a whole, once. Cycles are those of one wave alone, in units of 4 clocks (a wave of 64 lanes issues one vector
instruction in 4 clocks); `bound` is the throughput limit of the same instructions with enough waves. llvm-mca knows no
caches (a global load takes 80 units), no bank conflicts and no other waves, and counts transcendentals as one unit
(hardware: four). Needs llvm-readelf, llvm-objdump, llvm-mca and llvm-cxxfilt of LLVM 22.
"""
import argparse
import pathlib
import re
import shutil
import subprocess
import sys

LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
REGISTERS, REGISTER_BLOCK, SIMDS, MAX_WAVES, LANES = 512, 8, 4, 8, 64
NAMESPACES = re.compile(r"dsv4::(gpu|amd)::")
CLASSES = (
    ("mfma", re.compile(r"v_(mfma|smfmac)")),
    ("trans", re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")),
    ("f64", re.compile(r"v_.*_f64")),
    ("valu", re.compile(r"v_")),
    ("vmem", re.compile(r"(global|buffer|flat)_")),
    ("lds", re.compile(r"ds_")),
    ("sync", re.compile(r"s_(barrier|waitcnt|nop|sleep)")),
    ("salu", re.compile(r"s_")),
)


def tool(name):
    for candidate in (f"{name}-22", f"/usr/lib/llvm-22/bin/{name}", name):
        if shutil.which(candidate):
            return candidate
    sys.exit(f"amd_static_speed: {name} of LLVM 22 not found (package llvm-22)")


def output_of(*command, text=None):
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout


def resources(path):
    """{symbol: {key: number}} from the metadata note."""
    kernels, current = {}, {}
    for line in output_of(tool("llvm-readelf"), "--notes", str(path)).splitlines():
        if re.match(r"  - \.", line):
            current = {}
        found = re.match(r"  [- ] \.(\w+):\s+(\S+)", line)
        if not found:
            continue
        key, value = found.groups()
        current[key] = int(value) if value.isdigit() else value
        if key == "name":
            kernels[value] = current
    return kernels


def listings(path):
    """{symbol: [(address, instruction, branch target or None)]}"""
    out, code = {}, None
    for line in output_of(tool("llvm-objdump"), "-d", "--no-show-raw-insn", str(path)).splitlines():
        if found := re.match(r"([0-9a-f]+) <(\S+)>:", line):
            start, code = int(found[1], 16), out.setdefault(found[2], [])
        elif found := re.match(r"\s+(\S.*?)\s*// ([0-9A-F]+):?(.*)", line):
            target = re.search(r"<\S+?(?:\+0x([0-9a-f]+))?>", found[3]) if found[1].startswith(("s_cbranch", "s_branch")) else None
            code.append((int(found[2], 16), found[1], start + int(target[1] or "0", 16) if target else None))
    return out


def class_of(instruction):
    return next((name for name, pattern in CLASSES if pattern.match(instruction)), "other")


def hot_loop(code):
    """Instructions of the hottest innermost loop, and whether there is one."""
    loops = [(target, address) for address, _, target in code if target is not None and target <= address]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[text for address, text, _ in code if begin <= address <= end] for begin, end in innermost]
    if not bodies:
        return [text for _, text, _ in code], False
    return max(bodies, key=lambda body: (sum(class_of(i) == "mfma" for i in body), len(body))), True


def mca(instructions, chip, iterations):
    text = "\n".join(i for i in instructions if not i.startswith(("s_cbranch", "s_branch", "s_endpgm", "s_setpc")))
    report = output_of(tool("llvm-mca"), "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={chip}", f"-iterations={iterations}",
                       "-skip-unsupported-instructions=any", "-instruction-info=0", "-resource-pressure=0", text=text)
    value = lambda key: float(re.search(key + r":\s+([\d.]+)", report)[1])
    return value("Total Cycles") / iterations, value("Block RThroughput")


def waves_per_simd(kernel, chip):
    registers = -(-max(kernel["vgpr_count"], 1) // REGISTER_BLOCK) * REGISTER_BLOCK
    waves = min(MAX_WAVES, REGISTERS // registers)
    lds, size = kernel["group_segment_fixed_size"], kernel["max_flat_workgroup_size"]
    if lds:
        waves = min(waves, LDS_BYTES[chip] // lds * (size // LANES) / SIMDS)
    return waves


def rows_of(path, match, wants_mca):
    chip = path.stem.rsplit("_", 1)[1]
    kernels, code = resources(path), listings(path)
    names = output_of(tool("llvm-cxxfilt"), text="\n".join(kernels)).splitlines()
    for symbol, name in sorted(zip(kernels, names), key=lambda pair: pair[1]):
        if found := re.search(r"amd_entry<(.*)>\(", name):
            name = NAMESPACES.sub("", found[1]).strip()
        if match and not re.search(match, name):
            continue
        kernel, instructions = kernels[symbol], [text for _, text, _ in code[symbol]]
        body, is_loop = hot_loop(code[symbol])
        counts = {key: sum(class_of(i) == key for i in instructions) for key, _ in CLASSES}
        spills = kernel["vgpr_spill_count"] + kernel["sgpr_spill_count"]
        row = [name, chip, kernel["vgpr_count"], kernel.get("agpr_count", 0), kernel["sgpr_count"], spills,
               kernel["group_segment_fixed_size"], kernel["max_flat_workgroup_size"], f"{waves_per_simd(kernel, chip):g}",
               len(instructions), *(counts[key] for key, _ in CLASSES)]
        if wants_mca:
            cycles, bound = mca(body, chip, 32 if is_loop else 1)
            row += [f"{len(body)}" if is_loop else "all", f"{cycles:.0f}", f"{bound:.0f}"]
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=pathlib.Path, help="code objects <name>_<chip>.co, or folders of them")
    parser.add_argument("--match", help="regular expression on the kernel's type")
    parser.add_argument("--chip", help="gfx942 or gfx950 alone")
    parser.add_argument("--no-mca", action="store_true", help="without cycles: seconds instead of minutes")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    files = [f for path in options.paths for f in (sorted(path.glob("*.co")) if path.is_dir() else [path])]
    header = ["kernel", "chip", "VGPR", "AGPR", "SGPR", "spill", "LDS", "threads", "waves", "instr",
              *(key for key, _ in CLASSES)] + ([] if options.no_mca else ["loop", "units", "bound"])
    rows = [row for f in files if not options.chip or f.stem.endswith(options.chip)
            for row in rows_of(f, options.match, not options.no_mca)]
    if options.markdown:
        for row in [header, ["---"] * len(header), *rows]:
            print("| " + " | ".join(str(cell) for cell in row) + " |")
        return
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(f"{cell!s:<{w}}" if i < 2 else f"{cell!s:>{w}}" for i, (cell, w) in enumerate(zip(row, widths))))


if __name__ == "__main__":
    main()
