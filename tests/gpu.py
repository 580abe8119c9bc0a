"""Checks and measures a GPU in a few minutes: `python -m tests.gpu`.

Prints one table: versions, whether a forked process can use the GPU, training on all GPUs,
depthwise convolutions by type and memory layout, speed and memory of recipes by batch size,
operators per training step (each is one or a few kernels), losses by precision, a resumed run
beside an unbroken one, prediction, and what happens where memory is scarce. Images are drawn,
weights are random, nothing is downloaded. A part that fails says so in its row. On a machine
without a GPU it says so and ends.
"""

from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import product
import os
from pathlib import Path
import platform
import sys
import tempfile
import time

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # before torch looks for a GPU, so forks can

import accelerate
import timm
import torch
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
import torchvision

from src_snippets.model.detect import detect
from src_snippets.model.mask_rcnn import build_model, to_device
from src_snippets.setup.config import change_config, Config, make_config
from src_snippets.setup.devices import (
    autocast_for,
    default_device,
    free_memory,
    is_out_of_memory,
    launch,
)
from src_snippets.training.trainer import launch_training, Session, train
from tests.benchmarks.cases import baseline_model, counted_subset, grid_sample, new_trainer
from tests.benchmarks.recipes import seconds

RECIPES = ("baseline", "light", "best", "best_large")
BATCH_SIZES = (1, 2, 4, 8)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
FREE = ("view", "reshape", "expand", "slice", "select", "unbind", "split", "permute", "transpose")
FREE += ("t", "detach", "alias", "unsqueeze", "squeeze", "as_strided", "empty", "chunk")


class OperatorCount(TorchDispatchMode):
    """Counts the operators that compute something, forward and backward; views are free."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.split("::")[1].split(".")[0].strip("_") not in FREE
        return func(*args, **(kwargs or {}))


def versions() -> Iterator[tuple]:
    """What this machine has."""
    names = dict(torch=torch, torchvision=torchvision, timm=timm, accelerate=accelerate)
    yield "Python", platform.python_version()
    yield "packages", ", ".join(f"{name} {module.__version__}" for name, module in names.items())
    yield "CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    properties = torch.cuda.get_device_properties(0)
    yield "GPUs", f"{torch.cuda.device_count()} x {getattr(properties, 'name', 'unknown')}"
    yield "memory of the first", f"{properties.total_memory / 1e9:.1f} GB"
    yield "bfloat16", torch.cuda.is_bf16_supported(including_emulation=False)


def fork_probe() -> Iterator[tuple]:
    """Whether a fork can use the GPU, as training on several needs; before anything else does."""
    start_processes(lambda _: torch.zeros(1, device=default_device()), start_method="fork")
    yield "a forked process uses the GPU", "yes"


def train_with_times(config: Config, samples, folder: Path) -> tuple[list[dict], list[float]]:
    """The history, and when each epoch ended."""
    times = []
    parts = counted_subset(samples, config.num_classes), []
    history = train(config, *parts, folder, None, lambda *_: times.append(time.monotonic()))
    return history, times


def several_gpus(samples, name: str, epochs: int, **changes) -> Iterator[tuple]:
    """Training on all GPUs, one process each, with loaders, before anything else uses one; on one.

    The speed is that of the epochs between the first and the last, which writes checkpoints.
    """
    for gpus in sorted({torch.cuda.device_count(), 1}, reverse=True):
        config = recipe_config(name, epochs=epochs, gpus=gpus, **changes)
        with tempfile.TemporaryDirectory() as folder:
            history, times = launch(config, train_with_times, config, samples, Path(folder))
        batch = config.batch_size * gpus  # the loader drops a smaller one
        crops = len(samples) // batch * batch * (epochs - 2)
        speed = crops / (times[epochs - 2] - times[0])
        losses = ", ".join(f"{row['loss']:.3f}" for row in history)
        text = f"{speed:.1f} crops/s, losses by epoch {losses}"
        yield f"{name}, training on {gpus} GPU{'s' * (gpus > 1)}", text
    torch.cuda.set_per_process_memory_fraction(1.0)  # training left a margin


def depthwise(channels: int, side: int, times: int) -> Iterator[tuple]:
    """Time of depthwise convolutions, of EfficientNet (3, 5) and ConvNeXt (7), with gradients."""
    for kernel, dtype, layout in product((3, 5, 7), TYPES, LAYOUTS):
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        layer = layer.to(default_device(), dtype, memory_format=layout)
        x = torch.randn(4, channels, side, side, device=default_device(), dtype=dtype)
        x = x.to(memory_format=layout).requires_grad_()
        name = f"depthwise {kernel}x{kernel}, {str(dtype)[6:]}, {str(layout)[6:]}"
        try:
            spent = seconds(
                lambda x=x, layer=layer: layer(x).sum().backward(), default_device(), times
            )
            yield name, f"{1000 * spent:.2f} ms"
        except RuntimeError as error:  # reported on some cards for some layouts
            yield name, f"FAILS: {error}"


def recipe_config(name: str, **changes) -> Config:
    """A recipe from random weights, without what looks at the clock."""
    return make_config(name, **dict(weights="none", workers=0, accumulate=1) | changes)


def training_speed(samples, names, batch_sizes, times: int, **changes) -> Iterator[tuple]:
    """Steps per second and peak memory of recipes at several batch sizes."""
    for name in names:
        for batch_size in batch_sizes:
            config = recipe_config(name, batch_size=batch_size, **changes)
            row = f"{name}, batch size {batch_size}"
            try:
                torch.cuda.reset_peak_memory_stats()
                trainer = new_trainer(config, samples * batch_size)
                batch = next(iter(trainer.loader))
                spent = seconds(partial(trainer.step, *batch), default_device(), times)
                memory = torch.cuda.max_memory_allocated() / 1e9
                yield (
                    row,
                    f"{1 / spent:.2f} steps/s, {batch_size / spent:.1f} crops/s, {memory:.1f} GB",
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                yield row, "out of memory"
            trainer = batch = None
            free_memory()


def count_operators(samples, name: str, **changes) -> tuple[int, int]:
    """Operators of a training step from batch to new weights: ours, torchvision's Mask R-CNN.

    torchvision's step is in the same precision, with the scaler, clipping and AdamW of its users.
    """
    config, device = recipe_config(name, **changes), default_device()
    trainer = new_trainer(config, samples)
    images, targets = next(iter(trainer.loader))
    model = baseline_model(config, device.type).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=trainer.accelerator.scaler is not None)
    dense = [
        dict(
            boxes=target["boxes"],
            labels=target["labels"],
            masks=(target["layers"][target["layer_index"]] == target["ids"][:, None, None]).byte(),
        )
        for target in targets
    ]
    while not trainer.optimizer.state:  # that the optimizer keeps; fp16's first steps are skipped
        trainer.step(images, targets)
    with OperatorCount() as ours:
        trainer.step(images, targets)
    for counter in (OperatorCount(), OperatorCount()):
        with counter:
            with autocast_for(config, device):
                losses = model([image / 255 for image in images], dense)
            scaler.scale(sum(losses.values())).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return ours.count, counter.count


def operators(samples, names, **changes) -> Iterator[tuple]:
    """Operators per training step, each one or a few kernels on the GPU."""
    for name in names:
        ours, baseline = count_operators(samples, name, **changes)
        text = f"{ours:,}; torchvision's Mask R-CNN {baseline:,}; ratio {ours / baseline:.2f}"
        yield f"{name}, operators per training step", text


def precisions(samples, epochs: int, **changes) -> Iterator[tuple]:
    """Losses of the same training in each precision; they should be alike."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    for precision in ["no", "fp16"] + ["bf16"] * has_bf16:
        with tempfile.TemporaryDirectory() as folder:
            config = recipe_config("demo", precision=precision, epochs=epochs, **changes)
            history = train(config, samples, [], Path(folder))
        losses = ", ".join(f"{row['loss']:.3f}" for row in history)
        scale = f"; fp16 scale {history[-1]['scale']:g}" if "scale" in history[-1] else ""
        yield f"losses by epoch, precision={precision}", losses + scale


def resume(samples, epochs: int, **changes) -> Iterator[tuple]:
    """Largest difference of losses between an unbroken run and one that was stopped halfway."""
    config = recipe_config("demo", epochs=epochs, **changes)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        unbroken, session = train(config, samples, [], Path(one)), Session(0.0)

        def stop(history, *_):
            session.terminated = len(history) >= epochs // 2

        stopped = train(config, samples, [], Path(other), session, stop)
        resumed = train(config, samples, [], Path(other))
    pairs = zip(unbroken, resumed, strict=True)
    difference = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    yield f"run resumed after epoch {len(stopped)} of {epochs}", f"differs by {difference:.2g}"


def prediction(samples, names, times: int, **changes) -> Iterator[tuple]:
    """Images per second, from pixels to RLEs."""
    for name in names:
        config = recipe_config(name, **changes)
        model = to_device(build_model(config))
        spent = seconds(
            lambda m=model, c=config: detect([m], samples[0].image, c), default_device(), times
        )
        size = " x ".join(map(str, samples[0].size))
        yield f"{name}, prediction of {size} px in one view", f"{1 / spent:.2f} images/s"
        model = None
        free_memory()


def scarce_memory(samples, gigabytes: float, **changes) -> Iterator[tuple]:
    """Training and prediction with so much memory: smaller batches, smaller tiles."""
    total, limit = torch.cuda.mem_get_info()[1] / 1e9, torch.cuda.set_per_process_memory_fraction
    limit(min(gigabytes / total, 1.0))
    torch.cuda.set_per_process_memory_fraction = lambda _: None  # of the trainer
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = recipe_config("baseline", batch_size=16, **changes | dict(epochs=1))
            history = launch_training(config, samples * 8, [], Path(folder), None, None, True)
            yield f"training with {gigabytes:g} GB", f"loss {history[-1]['loss']:.3f}"
        model = to_device(build_model(config))
        found = detect(
            [model], samples[0].image.repeat(1, 4, 4), change_config(config, dict(tile=0))
        )
        size = " x ".join(map(str, found.size))
        yield f"prediction of {size} px with it", f"{len(found)} detections"
    finally:
        torch.cuda.set_per_process_memory_fraction = limit
        limit(1.0)


def quiet(rows: Iterator[tuple]) -> Iterator[tuple]:
    """The rows of a part; meanwhile standard output goes to standard error."""
    while True:
        with redirect_stdout(sys.stderr):
            row = next(rows, None)
        if row is None:
            return
        yield row


def run(parts, out=sys.stdout) -> None:
    """Prints the rows of all parts as a table; what the parts print goes to the errors."""
    print("| what | result |\n|---|---|", file=out)
    for part in parts:
        begin = time.perf_counter()
        try:
            for name, result in quiet(part()):
                print(f"| {name} | {result} |", file=out, flush=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"| {getattr(part, 'func', part).__name__} | FAILED after ", end="", file=out)
            print(f"{time.perf_counter() - begin:.0f} s: {reason} |", file=out, flush=True)
        free_memory()


def main() -> None:
    if not torch.cuda.is_available():
        print("No GPU on this machine: nothing is measured.")
        return
    samples, small = [grid_sample(400, 1000)] * 4, [grid_sample(36, 256)] * 8
    run(
        [
            fork_probe,
            partial(several_gpus, small * 6, "light", 4, workers=2),
            versions,
            partial(depthwise, 384, 64, 20),
            partial(training_speed, samples, RECIPES, BATCH_SIZES, 5),
            partial(operators, samples, RECIPES[:3]),
            partial(precisions, small, 6, workers=2),
            partial(resume, small, 4, workers=2),
            partial(prediction, samples, RECIPES, 3),
            partial(scarce_memory, samples, 4.0, crop=256),
        ]
    )


if __name__ == "__main__":
    main()
