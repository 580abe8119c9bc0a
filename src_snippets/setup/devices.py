"""Devices and processes: GPU or CPU, its precision, and one process for each GPU."""

# %%
# @title Devices, precision, and processes: one fork per GPU
from functools import partial
from io import StringIO
import os
import re
import signal
import sys
from tempfile import TemporaryFile
import traceback

import accelerate
import IPython
import pandas as pd
import torch
from torch import distributed
from torch.distributed.elastic.utils.distributed import get_free_port

from src_snippets.setup.config import Config, require


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(config: Config, device: torch.device) -> str:
    """`no`, `fp16` or `bf16` for a device; ValueError for a setting that it cannot compute."""
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    possible = ["no", *(["fp16"] if on_gpu else []), *(["bf16"] if has_bf16 else [])]
    expected = f"expected auto, {' or '.join(possible)} on this {device.type}"
    valid = config.precision in ("auto", *possible)
    require(valid, f"Setting precision={config.precision!r}: {expected}.")
    return config.precision if config.precision != "auto" else possible[-1] if on_gpu else "no"


def autocast_for(config: Config, device: torch.device) -> torch.autocast:
    """The context in which a device computes in the precision of the settings."""
    precision = choose_precision(config, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "no")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the GPU's memory is full; cuDNN and cuBLAS word it differently."""
    texts = r"OutOfMemory|out of memory|unable to find an engine|NOT_INITIALIZED|ALLOC\w*_FAILED"
    kinds = RuntimeError, torch.multiprocessing.ProcessRaisedException  # of `launch`
    return isinstance(error, kinds) and re.search(texts, repr(error)) is not None


free_memory = accelerate.utils.release_memory  # of objects in cycles, and the GPU's cache


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints, shows bars and writes files."""
    return rank() == 0


def rank_indices(count: int) -> range:
    """Which of `count` items this process works on: dealt in turns."""
    return range(rank(), count, world_size())


def gather(items: list) -> list:
    """The items of all processes, in every one, in the order in which `rank_indices` dealt them."""
    parts = [items] * world_size()
    if len(parts) > 1:
        distributed.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def broadcast(function, *arguments):
    """The result of `function` in the main process, in all; the others do not call it."""
    results = [function(*arguments) if is_main() else None]
    if world_size() > 1:
        distributed.broadcast_object_list(results)
    return results[0]


def all_max(*values: float) -> list[float]:
    """The maximum of each value over all processes."""
    return [max(column) for column in zip(*gather([values]), strict=True)]


def run_process(index: int, count: int, port: int, file, function, arguments) -> None:
    """Run one of the processes of `launch`; the main one leaves its result in an open file."""
    ranks = dict(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count))
    os.environ |= ranks | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # a fork has none of its parent's threads and would wait for them
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # that of the parent
    if kernel := getattr(IPython.get_ipython(), "kernel", None):
        kernel.session.check_pid = False  # or bars and figures of a fork are dropped
    if on_gpu := torch.cuda.is_available():
        torch.cuda.set_device(index)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=pd.Timedelta(hours=2))
    distributed.barrier()  # one that ended sooner would look like one that failed
    sys.stdout = sys.stdout if is_main() else StringIO()  # tqdm.write needs one
    try:
        result = function(*arguments)
    finally:  # loaders ignore SIGTERM, and the end of a process waits for them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error
        for loader in torch.multiprocessing.active_children():
            loader.kill()
    if is_main():
        torch.save(result, file)
        file.flush()
    distributed.destroy_process_group()


def launch(config: Config, function, *arguments):
    """The result of `function(*arguments)`, called here or in a forked process for each GPU.

    Where a process fails or is killed the others are ended, and ProcessRaisedException has its
    traceback, or RuntimeError says so. SIGTERM is passed on to all of them.
    """
    count = min(torch.cuda.device_count(), config.gpus or torch.cuda.device_count())
    fork = partial(torch.multiprocessing.start_processes, start_method="fork")
    try:
        if count > 1:
            fork(lambda _: torch.zeros(1, device=default_device()))  # can a fork use the GPU?
    except Exception as error:  # of the child, or no fork on Windows
        reason = (str(error) or repr(error)).splitlines()[-1]
        print(f"1 of {count} GPUs is used. Restart the session to use all of them ({reason}).")
        count = 1
    if count < 2:
        try:
            return function(*arguments)
        except BaseException as error:  # which a notebook keeps, and with its frames GPU memory
            for each in filter(None, (error, error.__context__)):
                traceback.clear_frames(each.__traceback__)
            raise
    port, before = get_free_port(), signal.getsignal(signal.SIGTERM)
    with TemporaryFile() as file:
        context = fork(run_process, (count, port, file, function, arguments), count, join=False)

        def forward(number, frame):
            for process in context.processes:
                process.terminate()
            signal.signal(number, before or signal.SIG_DFL)
            os.kill(os.getpid(), number)  # for what listened before, or the end

        signal.signal(signal.SIGTERM, forward)
        try:
            while not context.join(grace_period=1):  # until all have ended
                pass
        except torch.multiprocessing.ProcessExitedException as error:
            help_text = "If memory was full, lower cache_gb or workers, or set gpus=1. Run again."
            raise RuntimeError(f"A process was killed: {error}. {help_text}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        file.seek(0)
        return torch.load(file, weights_only=False)
