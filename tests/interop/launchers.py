#!/usr/bin/env python3
"""Lets each launcher read what `paceline export` writes for it, with the launcher's own parser and checks.

    python tests/interop/launchers.py target/release/paceline --megatron DIR --torchtitan DIR --nanotron DIR --deepspeed

A directory is a checkout of the launcher. Needs torch and what the launchers import; no GPU, no network; no part of the test
suite. Prints a line per case; exit code 0 when all are accepted, 1 when one is not.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

BIG = "--model llama-3-70b --cluster dgx-h100-ib --nodes 8 --seq 8192 --global-batch 128"
MOE = "--model mixtral-8x7b --cluster dgx-h100-ib --nodes 2 --seq 4096 --global-batch 64"
MLA = "--model deepseek-v3 --cluster dgx-h100-ib --nodes 32 --seq 4096 --global-batch 1024"
HUGE = "--model llama-3.1-405b --cluster dgx-h100-ib --nodes 64 --seq 8192 --global-batch 512"
SMALL = "--model gpt2-xl --cluster dgx-a100-ib --nodes 1 --seq 1024 --global-batch 64"
CASES = {
    "megatron": [
        f"{BIG} --tp 4 --pp 4 --chunks 2 --schedule interleaved",
        f"{BIG} --tp 8 --pp 4 --precision bf16-fp32-gradients --recompute selective",
        f"{BIG} --tp 8 --cp 2 --pp 2 --precision fp8 --recompute full",
        f"{BIG} --states zero3",
        f"{BIG} --states zero2",
        f"{BIG} --states IIG --group-size 8",
        f"{BIG} --states NNI --tp 8 --dp 8 --group-size 4",
        f"{HUGE} --tp 8 --pp 16",
        f"{MOE} --ep 8",
        f"{MLA} --ep 32 --pp 4 --tp 2",
        f"{SMALL} --states none --attention naive",
    ],
    "torchtitan": [
        f"{BIG} --tp 4 --pp 4 --schedule v-half --states zero2",
        f"{BIG} --tp 4 --pp 4 --schedule zb-h1 --states none",
        f"{BIG} --tp 8 --states zero3 --recompute operators",
        f"{BIG} --tp 2 --states III --group-size 4 --recompute full",
        f"{HUGE} --tp 8 --pp 16 --chunks 2 --schedule interleaved --states zero2",
    ],
    "nanotron": [
        f"{BIG} --tp 8 --pp 4 --precision bf16-fp32-accumulation",
        f"{BIG} --tp 8 --pp 2 --cp 2 --cp-exchange all-gather --recompute full",
        f"{MOE} --ep 8 --states none",
    ],
    "deepspeed": [
        f"{BIG} --states zero3 --recompute full",
        f"{BIG} --states zero2",
        f"{BIG} --states zero1 --pp 4",
        f"{BIG} --states zero1 --tp 8 --sp false",
    ],
}


def script_arguments(path):
    """Arguments of the Python program that a launch script starts."""
    text = path.read_text().split("pretrain_gpt.py")[1].replace("\\\n", " ").replace('$DATA "$@"', "")
    return shlex.split(text)


def run(code, arguments, environment, path):
    """Runs a program in its own interpreter; the last line it prints, or its error."""
    environment = {**os.environ, **environment, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, timeout=600)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else "nothing printed"


MEGATRON = """
import os, sys, typing
typing.override = getattr(typing, 'override', lambda f: f)
import torch
torch.cuda.get_device_capability = lambda *a: (9, 0)
torch.cuda.get_device_properties = lambda *a: type('Properties', (), {'major': 9, 'minor': 0, 'multi_processor_count': 132})()
from megatron.training import arguments
args = arguments.parse_args()
arguments.validate_args(args, {})
layout = args.pipeline_model_parallel_layout
if layout is not None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    layout = layout if not isinstance(layout, str) else PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    layout.validate_layer_layout(args.num_layers, None)
print(f'dp {args.data_parallel_size}, virtual stages {args.virtual_pipeline_model_parallel_size}')
"""


def megatron(files, checkout, gpus):
    script = (files / "launch.sh").read_text()
    environment = {"WORLD_SIZE": str(gpus), "RANK": "0", "LOCAL_RANK": "0"}
    if "CUDA_DEVICE_MAX_CONNECTIONS=1" in script:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    data = re.search(r"DATA:-(.*)}", script).group(1).split()
    return run(MEGATRON, script_arguments(files / "launch.sh") + data, environment, checkout)


TORCHTITAN = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from torchtitan.config.manager import ConfigManager
config = ConfigManager().parse_args(['--module', 'paceline_run', '--config', 'paceline'])
from torchtitan.distributed.pipeline_parallel import get_schedule_class
p = config.parallelism
names = p.module_fqns_per_model_part or []
blocks = [name for part in names for name in part if name.startswith('layers.')]
layers = len(config.model_spec.model.layers)
assert not names or blocks == [f'layers.{n}' for n in range(layers)], blocks
get_schedule_class(p.pipeline_parallel_schedule)
if p.pipeline_parallel_schedule_csv:
    assert pathlib.Path(p.pipeline_parallel_schedule_csv).is_file()
print(f'{p.pipeline_parallel_schedule}, shard {p.data_parallel_shard_degree}, replicate {p.data_parallel_replicate_degree}')
"""


def torchtitan(files, checkout, gpus):
    return run(TORCHTITAN, [str(files)], {}, checkout)


# Kernels that only a GPU has are not needed to read a configuration.
NANOTRON = """
import importlib.abc, importlib.machinery, sys, types
class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        known = name.split('.')[0] in ('flash_attn', 'flash_attn_cuda', 'ring_flash_attn', 'grouped_gemm', 'rotary_emb')
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__version__ = '2.8.0'
        module.__getattr__ = lambda name: type(name, (), {})
        return module
    def exec_module(self, module):
        pass
sys.meta_path.append(Absent())
from nanotron.config.config import get_config_from_file, Config
config = get_config_from_file(sys.argv[1], config_class=Config)
p = config.parallelism
assert p.dp * p.tp * p.pp * p.context_parallel_size == int(sys.argv[2])
print(f'{type(config.model.model_config).__name__}, batch {config.global_batch_size}, {p.pp_engine}, {p.tp_mode}')
"""


def nanotron(files, checkout, gpus):
    return run(NANOTRON, [str(files / "nanotron.yaml"), str(gpus)], {}, checkout / "src")


DEEPSPEED = """
import json, sys
import deepspeed.comm
deepspeed.comm.get_rank = lambda *a: 0
from deepspeed.runtime.config import DeepSpeedConfig
given = json.load(open(sys.argv[1]))
class Grid:
    def get_data_parallel_world_size(self):
        return int(sys.argv[2])
config = DeepSpeedConfig(given, mpu=Grid())
assert config.train_batch_size == given['train_batch_size']
print(f'stage {config.zero_optimization_stage}, accumulation {config.gradient_accumulation_steps}')
"""


def deepspeed(files, checkout, gpus):
    given = json.loads((files / "ds_config.json").read_text())
    replicas = given["train_batch_size"] // given["train_micro_batch_size_per_gpu"] // given["gradient_accumulation_steps"]
    return run(DEEPSPEED, [str(files / "ds_config.json"), str(replicas)], {}, pathlib.Path.cwd())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paceline", type=pathlib.Path)
    for name in ("megatron", "torchtitan", "nanotron"):
        parser.add_argument(f"--{name}", type=pathlib.Path)
    parser.add_argument("--deepspeed", action="store_true")
    arguments = parser.parse_args()
    checks = {"megatron": megatron, "torchtitan": torchtitan, "nanotron": nanotron, "deepspeed": deepspeed}
    failed = 0
    for name, check in checks.items():
        place = getattr(arguments, name)
        if not place:
            print(f"skip {name}: no checkout given")
            continue
        for case in CASES[name]:
            with tempfile.TemporaryDirectory() as folder:
                files = pathlib.Path(folder)
                command = [str(arguments.paceline.resolve()), "export", *case.split(), "--to", name, "-o", folder]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    ok, said = False, done.stderr.strip()
                else:
                    nodes = int(re.search(r"--nodes (\d+)", case).group(1))
                    ok, said = check(files, place if place is True else place.resolve(), nodes * 8)
            failed += not ok
            print(f"{'ok  ' if ok else 'FAIL'} {name}: {case}\n       {said}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
