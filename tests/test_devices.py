"""Devices, and processes: two of them, forked as the notebook does, on the CPU."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
import weakref

from accelerate import Accelerator
import IPython
import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from src_snippets.setup import devices
from src_snippets.setup.config import BadInput, make_config
from src_snippets.setup.devices import (
    all_max,
    autocast_for,
    broadcast,
    choose_precision,
    gather,
    is_main,
    is_out_of_memory,
    launch,
    rank,
    rank_indices,
    world_size,
)
from src_snippets.training.trainer import training_loader
from tests.benchmarks.cases import grid_sample

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEMO = make_config("demo")


@pytest.fixture
def two(monkeypatch):
    """As if there were two GPUs; their processes find none and take the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def exchange(word):
    print("said by process", rank())
    sys.stdout.write("")  # as older versions of tqdm.write do
    calls = []
    broadcast(calls.append, 1)
    return dict(
        calls=gather([len(calls)]),
        count=world_size(),
        turns=gather([f"{i} by {rank()}" for i in rank_indices(5)]),
        fewer=gather([rank()] * len(rank_indices(1))),
        first=broadcast(lambda suffix: f"{word} {rank()}{suffix}", "!"),
        highest=all_max(rank(), -rank(), rank() == 1),
        main=gather([is_main()]),
    )


def test_what_processes_exchange(two, capfd):
    assert launch(DEMO, exchange, "made by") == dict(
        calls=[1, 0],
        count=2,
        turns=["0 by 0", "1 by 1", "2 by 0", "3 by 1", "4 by 0"],
        fewer=[0],
        first="made by 0!",
        highest=[1, 0, True],
        main=[True, False],
    )
    out = capfd.readouterr().out
    assert "said by process 0" in out
    assert "said by process 1" not in out
    assert (world_size(), os.environ.get("RANK")) == (1, None)  # this process stays as it was


def test_one_process_has_all_to_itself():
    found = launch(DEMO, exchange, "made by")
    assert (found["count"], found["first"], found["main"]) == (1, "made by 0!", [True])
    assert found["turns"] == [f"{i} by 0" for i in range(5)]
    assert (found["fewer"], found["highest"]) == ([0], [0, 0, False])
    assert (gather([]), list(rank_indices(0)), all_max()) == ([], [], [])


def test_what_an_error_interrupted_is_not_kept():
    """A notebook keeps the last error, and with it all variables of the functions it came from."""
    kept = []

    def fails():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise KeyboardInterrupt

    def explains():
        try:
            fails()
        except KeyboardInterrupt as error:
            raise RuntimeError("lower crop") from error

    for function, kind in ((fails, KeyboardInterrupt), (explains, RuntimeError)):
        with pytest.raises(kind) as error:
            launch(DEMO, function)
        assert error.value.__traceback__
    assert [reference() for reference in kept] == [None, None]


def test_gpus_are_used_up_to_the_setting(two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    counts = [launch(make_config("demo", gpus=gpus), world_size) for gpus in (0, 1, 2, 4)]
    assert counts == [3, 1, 2, 3]


def learn():
    """The gradient that Accelerator's DDP gives, and what else a process has."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    accelerator.backward(model(torch.full((1, 1), 2.0 + 4 * rank())).sum())
    weight = next(model.parameters())
    parts = gather([(weight.item(), weight.grad.item(), torch.get_num_threads())])
    return accelerator.num_processes, parts


def test_accelerate_joins_the_processes_and_the_gradients_are_their_mean(two):
    before = torch.get_num_threads()
    Accelerator(cpu=True)  # its state in this process is not that of the forks
    torch.set_num_threads(2)
    try:
        count, (first, second) = launch(DEMO, learn)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (count, first) == (2, second)
    assert first[1:] == (4.0, 1)


def test_outputs_of_the_first_fork_reach_a_notebook(two, monkeypatch):
    session = SimpleNamespace(check_pid=True)
    shell = SimpleNamespace(kernel=SimpleNamespace(session=session))
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert launch(DEMO, lambda: session.check_pid) is False
    assert session.check_pid


def fail_in_second():
    if rank() == 1:
        raise BadInput("field.tif: broken")
    return gather([1])  # waits for the other


def vanish_in_second():
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return gather([1])


def test_an_error_in_one_process_ends_all_with_it(two):
    start = time.perf_counter()
    expected = r"(?s)Process 1 .*fail_in_second.*field\.tif: broken"
    with pytest.raises(ProcessRaisedException, match=expected):
        launch(DEMO, fail_in_second)
    assert time.perf_counter() - start < 10


def fail_one_after_the_other():
    time.sleep(0.0 if rank() else 0.3)
    raise BadInput(f"broken in {rank()}")


def test_of_several_errors_the_first_is_raised(two):
    with pytest.raises(ProcessRaisedException, match=r"(?s)Process 1 terminated.*broken in 1"):
        launch(DEMO, fail_one_after_the_other)


def sleep_unless_first():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank() == 0:
        raise BadInput("field.tif: broken")
    time.sleep(60)


def test_a_process_that_ignores_the_end_is_ended_too(two):
    start = time.perf_counter()
    with pytest.raises(ProcessRaisedException, match="Process 0 terminated"):
        launch(DEMO, sleep_unless_first)
    assert time.perf_counter() - start < 10


def fail_beside_loaders():
    config = make_config("demo", workers=2, batch_size=2, crop=64)
    for number, _ in enumerate(training_loader([grid_sample(4, 64)] * 16, config, 2)):
        if number:
            raise BadInput("ten bad steps")


def leave_loaders():
    config = make_config("demo", workers=2, batch_size=2, crop=64)
    batches = iter(training_loader([grid_sample(4, 64)] * 16, config, 2))
    LEFT.append((next(batches), batches))  # as accelerate before 1.4 holds them
    return len(LEFT)


LEFT = []


@pytest.mark.parametrize("function", [fail_beside_loaders, leave_loaders])
def test_a_process_ends_beside_its_loaders(function, two):
    """They ignore SIGTERM, by which Python ends them before it waits for them."""

    def too_late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(60)
    try:
        if function is leave_loaders:
            assert launch(DEMO, leave_loaders) == 1
            return
        with pytest.raises(ProcessRaisedException, match="ten bad steps"):
            launch(DEMO, fail_beside_loaders)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_process_that_is_killed_ends_all(two):
    expected = r"A process was killed: process 1 .* SIGKILL.*lower cache_gb"
    with pytest.raises(RuntimeError, match=expected):
        launch(DEMO, vanish_in_second)


def test_one_gpu_is_used_where_forks_cannot_use_it(two, monkeypatch, capsys):
    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    monkeypatch.setattr(devices, "default_device", refuse)
    assert launch(DEMO, world_size) == 1
    expected = "1 of 2 GPUs is used. Restart the session to use all of them (RuntimeError: Cannot"
    assert capsys.readouterr().out.startswith(expected)


def until_stopped(stops):
    """Works until all processes are told to end."""
    while -all_max(-len(stops))[0] < 1:
        time.sleep(0.01)
    return gather([len(stops)])


def test_sigterm_reaches_the_processes_and_this_one(two):
    stops, before = [], signal.getsignal(signal.SIGTERM)

    def handler(*_):
        stops.append(1)

    signal.signal(signal.SIGTERM, handler)
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert launch(DEMO, until_stopped, stops) == [1, 1]
        assert stops == [1]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("gpus", [1, 2])
def test_sigterm_ends_prediction_at_once(tmp_path, gpus):
    """Where nothing listens, as in prediction, the process ends, and its forks do."""
    folder = tmp_path / "pids"
    folder.mkdir()
    code = f"""
import os, time, torch
from pathlib import Path
from src_snippets.setup.config import make_config
from src_snippets.setup.devices import launch
torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: {gpus}
def work():
    Path({str(folder)!r}, str(os.getpid())).touch()
    time.sleep(600)
launch(make_config("demo"), work)
"""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=file)
    until = time.time() + 120
    while len(list(folder.iterdir())) < gpus:
        assert process.poll() is None, errors.read_text()
        assert time.time() < until
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    for path in folder.iterdir():
        assert int(path.name) == process.pid or is_gone(int(path.name))


def is_gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("code", [signal.SIGKILL, None])
def test_a_probe_that_dies_leaves_one_gpu(two, monkeypatch, capsys, code):
    def probe(*_, **__):
        if code is None:
            raise ValueError("cannot find context for 'fork'")
        os.kill(os.getpid(), code)

    if code is None:  # as on Windows
        monkeypatch.setattr(torch.multiprocessing, "start_processes", probe)
    else:
        monkeypatch.setattr(torch, "zeros", probe)
    assert launch(DEMO, lambda: "here") == "here"
    assert capsys.readouterr().out.startswith("1 of 2 GPUs is used.")


def write_pid_and_sleep(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def test_an_interrupt_ends_the_processes(two, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of the background
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launch(DEMO, write_pid_and_sleep, tmp_path)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_precision(monkeypatch):
    def chosen(device):
        return [choose_precision(make_config("demo", precision=p), device) for p in ("auto", "no")]

    assert chosen(CPU) == ["no", "no"]
    assert choose_precision(make_config("demo", precision="bf16"), CPU) == "bf16"
    with pytest.raises(
        ValueError, match=r"precision='fp16': expected auto, no or bf16 on this cpu"
    ):
        choose_precision(make_config("demo", precision="fp16"), CPU)
    options = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **o: options.append(o) or has_bf16)
    has_bf16 = True
    assert chosen(GPU) == ["bf16", "no"]
    assert options[0] == dict(including_emulation=False)  # a T4 emulates it, slowly
    has_bf16 = False
    assert chosen(GPU) == ["fp16", "no"]
    with pytest.raises(ValueError, match="expected auto, no or fp16 on this cuda"):
        choose_precision(make_config("demo", precision="bf16"), GPU)


def test_autocast_computes_in_the_precision_of_the_settings():
    a = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("auto", torch.float32)):
        with autocast_for(make_config("demo", precision=precision), CPU):
            assert (a @ a).dtype == dtype


def test_which_errors_say_that_memory_is_full():
    texts = ["CUDA out of memory. Tried to allocate 2 GiB", "CUDNN_STATUS_ALLOC_FAILED"]
    texts += ["CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
    texts += ["cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"]  # cuDNN 9
    texts += ["CUDNN_STATUS_NOT_INITIALIZED", "CUBLAS_STATUS_NOT_INITIALIZED when calling"]
    texts += ["GET was unable to find an engine to execute this computation"]
    assert all(is_out_of_memory(RuntimeError(text)) for text in texts)
    assert is_out_of_memory(torch.OutOfMemoryError(""))
    assert is_out_of_memory(ProcessRaisedException("CUDA out of memory", 0, 1))
    others = [RuntimeError("shapes differ"), MemoryError("out of memory"), BadInput("no memory")]
    assert not any(is_out_of_memory(error) for error in others)
