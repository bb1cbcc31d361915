#!/usr/bin/env python3
"""Shows when kernels began and ended (tools/cuda_kernel_times.cc), from one call of a kernel to the next.

  tools/kernel_times.py FILE --from RmsNormPair [--skip 120] [--count 2]

`--from` is a part of the name of a kernel that runs once a round; times are microseconds since its beginning. A kernel that
begins before the one above it has ended waits there for it, or runs beside it on another stream.
"""
import argparse
import re
import sys

NOISE = re.compile(r"\(anonymous namespace\)::|dsv4::|nvidia::|gpu::|\bvoid ")


def read(path):
    with open(path) as lines:
        for line in lines:
            begin, end, stream, blocks, threads, name = line.rstrip("\n").split(" ", 5)
            yield int(begin), int(end), stream, blocks, threads, NOISE.sub("", name).split("(")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--from", dest="first", required=True, help="part of a kernel's name: a round begins with it")
    parser.add_argument("--skip", type=int, default=0, help="rounds, before the first that is shown")
    parser.add_argument("--count", type=int, default=1, help="rounds that are shown")
    arguments = parser.parse_args()
    rows = list(read(arguments.file))
    starts = [i for i, row in enumerate(rows) if arguments.first in row[5]]
    if len(starts) < arguments.skip + arguments.count + 1:
        sys.exit(f"{arguments.file}: {len(starts)} kernels named *{arguments.first}*, expected more than "
                 f"{arguments.skip + arguments.count}")
    for begin, end in list(zip(starts, starts[1:]))[arguments.skip:arguments.skip + arguments.count]:
        zero = rows[begin][0]
        print(f"{'begin':>8} {'end':>8} {'stream':>6} {'blocks':>6} {'threads':>7}  kernel; the next round begins at "
              f"{(rows[end][0] - zero) / 1e3:.2f}")
        for row in rows[begin:end]:
            print(f"{(row[0] - zero) / 1e3:8.2f} {(row[1] - zero) / 1e3:8.2f} {row[2]:>6} {row[3]:>6} {row[4]:>7}  {row[5]}")


if __name__ == "__main__":
    main()
