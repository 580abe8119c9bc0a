"""Several GPUs: the same work in a process for each."""

# %% [markdown]
# ## More than one GPU?
# Training and answering run in one process a GPU, forked by accelerate's `notebook_launcher`; for
# that this process itself leaves the GPUs alone. Each process computes its own crops and images,
# and the first one alone prints, shows bars and writes files. `accelerate launch` runs all of the
# notebook so, as a script, on one host or several.

# %%
import atexit
from collections.abc import Sequence
import io
import os
from pathlib import Path
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import traceback

from accelerate import notebook_launcher, PartialState
from accelerate.state import AcceleratorState
import IPython
import torch
from torch import distributed, Tensor
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from src_snippets.config import Config


# %%
def process_count() -> int:
    """How many processes do this work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this one among them, from 0 on."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that prints, shows bars and writes files."""
    return process_index() == 0


# %%
class Silence(io.TextIOBase):
    """Where processes but the first print to."""

    def write(self, text: str) -> int:
        return len(text)


def join_processes() -> None:
    """Takes part in the processes that `accelerate launch` started, if it did."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # GPUs are counted, not touched
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        PartialState(cpu=not torch.cuda.is_available())
        atexit.register(distributed.destroy_process_group)
        if not is_first():
            sys.stdout = Silence()


def private_folder() -> Path:
    """A folder that goes with this process: what it would write beside the first one's."""
    folder = tempfile.mkdtemp(prefix="hw3-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# %%
def default_device() -> torch.device:
    """The GPU of this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_turns(count: int) -> range:
    """Which of so many items this process has: dealt in turns."""
    return range(process_index(), count, process_count())


def gathered(own: list) -> list:
    """The items of all processes, in every one, in the order in which `own_turns` dealt them."""
    count = process_count()
    if count == 1:
        return own
    parts = [None] * count
    distributed.all_gather_object(parts, own)
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


def from_first(make, *arguments):
    """What `make` gives in the first process, in all of them; the others do not call it."""
    found = [make(*arguments) if is_first() else None]
    if process_count() > 1:
        distributed.broadcast_object_list(found)
    return found[0]


# %%
def summed(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor, in its place."""
    if process_count() > 1:
        distributed.all_reduce(values)
    return values


def highest(*values: float) -> list[float]:
    """The highest of each value over all processes."""
    if process_count() > 1:
        together = torch.tensor(values, dtype=torch.float64, device=default_device())
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return together.tolist()
    return list(values)


def make_equal(tensors: Sequence[Tensor], bucket: int = 2**24) -> None:
    """Puts the mean over all processes into float tensors, some of them at a time.

    Args:
        tensors: of the same shapes in every process; bucket: numbers sent at once, at least.
    """
    waiting, size = [], 0
    for place, tensor in enumerate(tensors if process_count() > 1 else []):
        waiting.append(tensor)
        size += tensor.numel()
        if size >= bucket or place == len(tensors) - 1:
            flat = summed(torch.cat([t.flatten() for t in waiting])).div_(process_count())
            for own, mean in zip(waiting, flat.split([t.numel() for t in waiting]), strict=True):
                own.copy_(mean.view_as(own))
            waiting, size = [], 0


# %%
def gpu_count(config: Config) -> int:
    """How many GPUs are used: all of this machine, or at most `gpus` of the settings."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min(count, config.gpus or count)


def on_all_gpus(config: Config, work, *arguments):
    """Calls `work(*arguments)`: here, or in one process for each GPU where there are several.

    Returns:
        What it returns in the first process.

    Raises:
        Exception: the first error of any process; the others are ended.
        RuntimeError: a process vanished without one, as where the memory of the machine was full.
    """
    count = gpu_count(config)
    if count > 1 and torch.cuda.is_initialized():
        print("One GPU alone is used: this session has used it already. Restart it for all.")
        count = 1
    if count < 2 or process_count() > 1:
        return work(*arguments)
    return fork_processes(count, work, arguments)


# %%
def free_port() -> str:
    """A port that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torch's launcher


def fork_processes(count: int, work, arguments):
    """As `on_all_gpus`, in so many processes."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of work that was done here before
    before = {number: signal.getsignal(number) for number in CAUGHT}
    stop = before[signal.SIGTERM] or signal.SIG_DFL
    with tempfile.TemporaryDirectory() as folder:
        own = (Path(folder), stop, work, arguments)
        try:
            notebook_launcher(work_in_process, own, num_processes=count, use_port=free_port())
        except SignalException as error:  # it went to all of them
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            if not callable(stop):
                raise
            stop(error.sigval, None)
        except ChildFailedError as error:
            raise first_error(Path(folder), error) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        kept = Path(folder) / "result"
        if not kept.exists():
            raise RuntimeError(
                "The processes for the GPUs were told to end (SIGTERM) and had not after 30 s. "
                "What they finished is kept: run again to go on."
            )
        return pickle.loads(kept.read_bytes())


# %%
def first_error(folder: Path, error: ChildFailedError) -> Exception:
    """What went wrong first in the processes that wrote their errors into a folder."""
    written = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        return RuntimeError(
            "A process for a GPU ended without a word; the machine's memory may be full. Lower "
            f"cache_gb or workers, or set gpus=1, and run from the settings on. {error}"
        )
    return pickle.loads(written[0].read_bytes())


def is_of_others(error: Exception) -> bool:
    """Whether it only says that another process was not there to exchange something with."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("distributed" in Path(frame.filename).parts for frame in frames)


# %%
def keep_result(content, path: Path) -> None:
    """Writes what this process hands over to the one that started it."""
    whole = path.with_name(f".{path.name}")
    whole.write_bytes(pickle.dumps(content))
    whole.replace(path)


def work_in_process(folder: Path, stop, work, arguments) -> None:
    """What each process does: works together with the others; keeps a result or an error."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # a fork has none of the threads that it believes to have
    signal.signal(signal.SIGTERM, stop)
    PartialState(cpu=not torch.cuda.is_available())
    if not is_first():
        sys.stdout = Silence()
    if kernel := getattr(IPython.get_ipython(), "kernel", None):
        kernel.session.check_pid = False  # or bars and pictures of a fork would be dropped
    try:
        found = work(*arguments)
    except Exception as error:
        error.add_note(f"In process {process_index()}:\n{traceback.format_exc()}")
        if not is_of_others(error):
            keep_result(error, folder / f"error-{process_index()}")
        raise
    if is_first():
        keep_result(found, folder / "result")
    distributed.destroy_process_group()
