#!/usr/bin/env python3
"""Runs schedule CSVs (compute-only) on PyTorch's own pipeline runtime and compares every gradient with the plain model.

    paceline schedule v-half -p 4 -m 8 --export pytorch v-half.csv
    python tests/interop/pytorch_schedule.py v-half.csv [more.csv ...]

Needs torch (2.9 or later, the CPU build is enough); not part of the test suite. One process per rank on this machine, gloo
on loopback. Exit code 0 when all gradients agree, 1 when some do not, 2 when a file cannot be used.
"""

import argparse
import csv
import os
import re
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

HIDDEN = 8
ROWS_PER_MICROBATCH = 3
CELL = re.compile(r"(\d+)([FIWB])(\d+)")


def read_shape(path):
    """Stages of every rank, and the number of microbatches, from the cells."""
    with open(path, newline="") as file:
        rows = [[m for cell in row for m in CELL.findall(cell)] for row in csv.reader(file)]
    if not rows or not all(rows):
        raise ValueError(f"{path}: every row needs at least one action")
    stages = [sorted({int(stage) for stage, _, _ in row}) for row in rows]
    microbatches = 1 + max(int(microbatch) for row in rows for _, _, microbatch in row)
    return stages, microbatches


def build_stage(index):
    """A stage's module; the same numbers on every rank and in the reference."""
    generator = torch.Generator().manual_seed(1000 + index)
    module = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, HIDDEN))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module


def batch(microbatches):
    """Inputs and targets of the whole step."""
    generator = torch.Generator().manual_seed(7)
    shape = (microbatches * ROWS_PER_MICROBATCH, HIDDEN)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def loss_of(output, target):
    return torch.nn.functional.mse_loss(output, target)


def reference_gradients(stage_count, microbatches):
    """Gradients of the plain model, summed over the microbatches; by stage."""
    modules = [build_stage(index) for index in range(stage_count)]
    model = torch.nn.Sequential(*modules)
    inputs, targets = batch(microbatches)
    for x, y in zip(inputs.chunk(microbatches), targets.chunk(microbatches)):
        loss_of(model(x), y).backward()
    return [[parameter.grad for parameter in module.parameters()] for module in modules]


def run_rank(rank, path, stages, microbatches, rendezvous, results):
    """One rank: its stages, PyTorch's runtime, one step; reports the largest relative difference."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(stages))
    try:
        stage_count = sum(len(own) for own in stages)
        last = stage_count - 1
        modules = {index: build_stage(index) for index in stages[rank]}
        pipeline_stages = [PipelineStage(modules[i], i, stage_count, torch.device("cpu")) for i in stages[rank]]
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 15):
            # Older versions warm the connections up with an integer send against a float receive, which gloo refuses.
            for stage in pipeline_stages:
                stage._get_init_p2p_neighbors_ops = list
        # Gradients are left as sums: with a split backward, older versions scale some stages wrongly.
        runtime = _PipelineScheduleRuntime(pipeline_stages, microbatches, loss_fn=loss_of, scale_grads=False)
        runtime._load_csv(path, format="compute_only")
        inputs, targets = batch(microbatches)
        arguments = [inputs] if 0 in modules else []
        keywords = {"target": targets, "losses": []} if last in modules else {}
        runtime.step(*arguments, **keywords)
        expected = reference_gradients(stage_count, microbatches)
        worst = 0.0
        for index, module in modules.items():
            for parameter, gradient in zip(module.parameters(), expected[index]):
                if parameter.grad is None:
                    raise AssertionError(f"stage {index} has a parameter without gradient")
                difference = (parameter.grad - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
                worst = max(worst, difference.item())
        results.put((rank, worst, None))
    except Exception:
        results.put((rank, float("inf"), traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()


def run_file(path, tolerance, timeout):
    """Runs one CSV; returns whether all gradients agree."""
    stages, microbatches = read_shape(path)
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (path, stages, microbatches, os.path.join(folder, "rendezvous"), results)
        ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(len(stages))]
        for process in ranks:
            process.start()
        worst, failures = 0.0, []
        try:
            for _ in ranks:
                rank, difference, failure = results.get(timeout=timeout)
                worst = max(worst, difference)
                if failure:
                    failures.append(f"rank {rank}:\n{failure}")
                    break
        except Exception:
            failures.append(f"no answer within {timeout} seconds")
        finally:
            for process in ranks:
                process.join(timeout=5 if not failures else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    agrees = not failures and worst <= tolerance
    shape = f"{len(stages)} ranks, {sum(map(len, stages))} stages, {microbatches} microbatches"
    print(f"{'ok  ' if agrees else 'FAIL'} {path}: {shape}, largest relative difference {worst:.2e}", flush=True)
    for failure in failures:
        print(failure, file=sys.stderr)
    return agrees


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", help="compute-only schedule files")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per file (default 120)")
    options = parser.parse_args()
    try:
        for path in options.csv:
            read_shape(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes = [run_file(path, options.tolerance, options.timeout) for path in options.csv]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
