#!/usr/bin/env python3
"""Runs FlashMLA's own tests against dsv4.flash_mla.

    flash_mla_suite.py DIR [--shard I/N] [--every K] [--module NAME] [--device cuda:0]

DIR is the folder `tests` of a checkout of deepseek-ai/FlashMLA; nothing in it is edited. Its
modules lib, ref, quant, kernelkit and both sparse test modules are imported as they are, with
dsv4.flash_mla in the place of flash_mla. Each module's own cases with d_qk 512 and num_runs 0 go
through its own test function: all corner cases, and every K-th of the correctness cases by index.
A case gets the seed that it has in the module's own run, whatever the shard.

Prints `run / passed / in all`; exits with 1 when a case fails, and with 2 when none was run. Needs
torch with CUDA, or --device cpu, which runs the CPU backend (torch.cuda is then not called).
"""

import argparse
import ast
import contextlib
import importlib
import io
import pathlib
import sys
import time
import traceback
import types

import torch

# The modules, and the names of their test function and case lists.
MODULES = {
    "decoding": (
        "test_flash_mla_sparse_decoding",
        "test_flash_mla",
        ["correctness_cases"],
        ["corner_cases"],
    ),
    "prefill": (
        "test_flash_mla_sparse_prefill",
        "run_test",
        ["correctness_cases", "correctness_cases_with_features"],
        ["corner_cases"],
    ),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", type=pathlib.Path, help="folder `tests` of FlashMLA")
    parser.add_argument("--shard", default="0/1", help="I/N: cases I, I + N, ... of those chosen")
    parser.add_argument("--every", type=int, default=6, help="of the correctness cases (default 6)")
    parser.add_argument("--module", choices=[*MODULES, "both"], default="both")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--list", action="store_true", help="only print the cases")
    parser.add_argument(
        "--max-rows",
        type=int,
        default=0,
        help="leave out cases with more (query, key) pairs than this; 0: none",
    )
    arguments = parser.parse_args()
    try:
        index, count = (int(part) for part in arguments.shard.split("/"))
    except ValueError:
        parser.error(f"--shard {arguments.shard}: expected I/N")
    if not 0 <= index < count:
        parser.error(f"--shard {arguments.shard}: expected 0 <= I < N")
    if arguments.every < 1:
        parser.error(f"--every {arguments.every}: expected 1 or more")
    if not (arguments.tests / "lib.py").is_file():
        parser.error(f"{arguments.tests}: no lib.py in it")
    arguments.shard_index, arguments.num_shards = index, count
    return arguments


# ---- surroundings of the modules


def provide(name, **attributes):
    """A stand-in for a module that tests import for their tables or benchmarks only."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module


def take_lists_of_slices():
    """kernelkit indexes with a list of slices, which torch 2.9 and later take for a tensor."""
    getitem = torch.Tensor.__getitem__

    def with_tuples(tensor, index):
        if isinstance(index, list) and all(isinstance(part, slice) for part in index):
            index = tuple(index)
        return getitem(tensor, index)

    torch.Tensor.__getitem__ = with_tuples


def prepare(arguments):
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(arguments.tests.resolve()))
    sys.modules["flash_mla"] = importlib.import_module("dsv4.flash_mla")
    take_lists_of_slices()
    provide("triton", jit=lambda function: function)
    for name in ("rich", "rich.console", "rich.table"):
        provide(name)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.cuda.synchronize = torch.cuda.empty_cache = lambda *unused: None
        torch.Tensor.cuda = lambda tensor, *unused: tensor
    else:
        torch.cuda.set_device(device)
        torch.set_num_threads(32)
    # As both modules do before they run their cases.
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")


# ---- the modules' own cases


def lists_of_function(function, names):
    """Calls `function` and returns its local lists as they are when it returns."""
    found = {}

    def watch(frame, event, _):
        if event == "return" and frame.f_code is function.__code__:
            found.update({name: frame.f_locals[name] for name in names})

    sys.setprofile(watch)
    try:
        everything = function()
    finally:
        sys.setprofile(None)
    return everything, found


def lists_of_main_block(module, names):
    """Evaluates the assignments of lists in the block of `__main__`, and nothing else of it."""
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assignments = [
        node
        for node in block.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, (ast.List, ast.ListComp, ast.BinOp))
    ]
    scope = dict(module.__dict__)
    exec(compile(ast.Module(assignments, []), module.__file__, "exec"), scope)
    return scope["testcases"], {name: scope[name] for name in names}


def own_cases(module, correctness, corner):
    """[(index in the module's own run, case, is a corner case)], all of the module's."""
    names = correctness + corner
    if hasattr(module, "gen_testcase"):
        everything, lists = lists_of_function(module.gen_testcase, names)
        as_parameters = [case.to_test_param() for case in everything]
    else:
        everything, lists = lists_of_main_block(module, names)
        as_parameters = everything
    kinds = {id(case): name in corner for name in names for case in lists[name]}
    return [
        (index, parameters, kinds[id(case)])
        for index, (case, parameters) in enumerate(zip(everything, as_parameters))
        if id(case) in kinds
    ]


def chosen_cases(arguments, module, correctness, corner):
    """Those to run in any shard, and how many cases with d_qk 512 there are."""
    ours = [
        entry
        for entry in own_cases(module, correctness, corner)
        if entry[1].d_qk == 512 and entry[1].num_runs == 0
    ]
    plain = [entry for entry in ours if not entry[2]]
    corners = [entry for entry in ours if entry[2]]
    return corners + plain[:: arguments.every], len(ours)


def num_pairs(case):
    queries = case.s_q * (case.decode.b if case.decode else 1)
    return queries * (case.topk + ((case.decode.extra_topk or 0) if case.decode else 0))


# ---- running


def passes(module, test, index, case):
    """Runs one case; prints what it printed when it fails."""
    module._counter.count = index  # the seed that it gets in the module's own run
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            result = test(case)
        if getattr(result, "is_correct", result) is True:
            return True
    except Exception:  # noqa: BLE001: any failure is the case's
        traceback.print_exc(file=output)
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # shards share a card: what torch keeps, another one lacks
    print(f"FAILED {module.__name__} case {index}\n{output.getvalue()}", flush=True)
    return False


def main():
    arguments = parse_arguments()
    prepare(arguments)
    run = passed = in_all = 0
    for name, (file, test, correctness, corner) in MODULES.items():
        if arguments.module not in (name, "both"):
            continue
        module = importlib.import_module(file)
        chosen, existing = chosen_cases(arguments, module, correctness, corner)
        if arguments.max_rows:
            chosen = [entry for entry in chosen if num_pairs(entry[1]) <= arguments.max_rows]
        shard = chosen[arguments.shard_index :: arguments.num_shards]
        if arguments.list:
            for index, case, is_corner in shard:
                print(name, index, "corner" if is_corner else "correctness", case)
            continue
        begin = time.monotonic()
        module_passed = 0
        for number, (index, case, _) in enumerate(shard):
            module_passed += passes(module, getattr(module, test), index, case)
            if number % 50 == 49:
                print(
                    f"{name}: {number + 1} of {len(shard)}, {module_passed} passed, "
                    f"{time.monotonic() - begin:.0f} s",
                    flush=True,
                )
        print(
            f"{name}: run {len(shard)} / passed {module_passed} / in all {existing} "
            f"({time.monotonic() - begin:.0f} s, shard {arguments.shard})",
            flush=True,
        )
        run, passed, in_all = run + len(shard), passed + module_passed, in_all + existing
    if arguments.list:
        return 0
    print(f"FlashMLA, d 512: run {run} / passed {passed} / in all {in_all}")
    return 2 if run == 0 else int(passed != run)


if __name__ == "__main__":
    sys.exit(main())
