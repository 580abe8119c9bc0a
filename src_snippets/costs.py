"""What a training will take: one measured step, and what follows from it."""

# %% [markdown]
# ## How long will it take, and how much memory?
# A few steps are done with weights that are thrown away, and one field is answered. What all
# epochs need follows from that; a slow first epoch, other users of the machine and the end of
# `train_hours` are not in it.

# %%
from collections.abc import Sequence
import time
from typing import NamedTuple

import torch

from src_snippets.config import Config
from src_snippets.forms import CellSample
from src_snippets.model import build_model
from src_snippets.predict import answering_seconds
from src_snippets.processes import default_device, process_count
from src_snippets.train import add_gradients, build_accelerator, build_optimizer
from src_snippets.transforms import collate, TrainingSet


# %%
class Costs(NamedTuple):
    """What was measured.

    Attributes:
        step: seconds of one update of the weights, without the time to read and augment.
        memory, room: GB that a step takes at most of the GPU, and that the GPU has; 0 on a CPU.
        answer: seconds for a megapixel of images to answer, by all processes together.
        processes: how many work together.
    """

    step: float
    memory: float
    room: float
    answer: float
    processes: int


def measure_costs(config: Config, samples: Sequence[CellSample], fullest: int) -> Costs:
    """Does three steps and answers one field, with random weights.

    Args:
        samples: the training part; fullest: the place of the one with most cells.

    Raises:
        torch.OutOfMemoryError: never: a step that does not fit is `inf` GB.
    """
    device, crops = default_device(), TrainingSet(samples, config)
    images, targets = collate([crops[fullest] for _ in range(config.batch_size)])
    accelerator = build_accelerator(config)
    model = build_model(config, load_initial=False)
    optimizer = accelerator.prepare(build_optimizer(model, config))
    model = accelerator.prepare_model(model, evaluation_mode=True).train()
    gpu, spent, memory, room = device.type == "cuda", [], 0.0, 0.0
    try:
        for _ in range(3):  # the first is slow for other reasons
            begin = time.perf_counter()
            add_gradients(model, images, targets, accelerator, 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if gpu:
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError:
        memory = float("inf")
    if gpu:
        memory = max(memory, torch.cuda.max_memory_allocated() / 1e9)
        room = torch.cuda.get_device_properties(device).total_memory / 1e9
    del model, optimizer
    answer = answering_seconds(config, samples[fullest], 1_000_000)
    step = min(spent[1:], default=float("inf")) * config.accumulate
    return Costs(step, memory, room, answer, process_count())


# %%
def span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_costs(costs: Costs, config: Config, steps: int, looks: float) -> str:
    """Steps, time and memory of a training in a few lines.

    Args:
        steps: updates of the weights in all epochs.
        looks: megapixels that are answered in all looks at the validation part.
    """
    alone = f"{costs.processes} GPUs" if costs.processes > 1 else "here"
    lines = [f"{steps:,} steps of {1000 * costs.step:.0f} ms {alone}: {span(steps * costs.step)}"]
    lines[0] += f", and {span(looks * costs.answer)} for looks at the validation part"
    if config.train_hours:
        lines.append(f"ends after {config.train_hours:g} h of training at the latest")
    if costs.memory == float("inf"):
        lines.append("A batch does not fit into the GPU's memory: it will be computed in parts,")
        lines.append("which is slower. Lower batch_size, crop or scale.")
    elif costs.room:
        lines.append(f"a step takes {costs.memory:.1f} of the GPU's {costs.room:.1f} GB")
    return "\n".join(lines)
