"""What a training will take: some measured steps, and what follows from them."""

# %% [markdown]
# ## How long will it take, and how much memory?
# A few steps are done with weights that are thrown away, and one field is answered. What all
# epochs need follows from that; a slow first epoch, other users of the machine and the end of
# `train_hours` are not in it.

# %%
from collections.abc import Sequence
import math
import time
from typing import NamedTuple

from accelerate.utils import send_to_device
import torch

from src_snippets.config import Config
from src_snippets.forms import CellSample
from src_snippets.model import build_model
from src_snippets.predict import answering_seconds, seen_once
from src_snippets.processes import default_device, highest, process_count
from src_snippets.train import add_gradients, build_accelerator, build_optimizer
from src_snippets.transforms import collate, TrainingSet


# %%
class Costs(NamedTuple):
    """What was measured.

    Attributes:
        step: seconds of one update of the weights, without the time to read and augment.
        memory, room: GB that a step takes at most of the GPU, and that the GPU has; 0 on a CPU.
        answer, look: seconds for a megapixel to answer, and to look at in training, by all
            processes together.
        processes: how many work together.
    """

    step: float
    memory: float
    room: float
    answer: float
    look: float
    processes: int


def measure_costs(config: Config, samples: Sequence[CellSample], fullest: int) -> Costs:
    """Does three steps and answers one field, with random weights.

    Args:
        samples: the training part; fullest: the place of the one with most cells.

    Raises:
        torch.OutOfMemoryError: not even one field can be answered; a step that does not fit is
            `inf` GB.
    """
    device, crops = default_device(), TrainingSet(samples, config)
    batch = collate([crops[fullest] for _ in range(config.batch_size)])
    images, targets = send_to_device(batch, device)
    accelerator = build_accelerator(config)
    model = build_model(config, load_initial=False)
    optimizer = accelerator.prepare(build_optimizer(model, config))
    model = accelerator.prepare_model(model, evaluation_mode=True).train()
    gpu, spent, memory = device.type == "cuda", [], 0.0
    for _ in range(3):  # the first is slow for other reasons
        begin = time.perf_counter()
        try:
            add_gradients(model, images, targets, accelerator, 1)
            optimizer.step()
        except torch.OutOfMemoryError:
            memory = math.inf
        optimizer.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        (memory,) = highest(memory)  # a step that one of them cannot do is done by none
        if memory == math.inf:
            break
        spent.append(time.perf_counter() - begin)
    room = torch.cuda.get_device_properties(device).total_memory / 1e9 if gpu else 0.0
    memory = max(memory, torch.cuda.max_memory_allocated() / 1e9) if gpu else memory
    del model, optimizer
    once = seen_once(config)
    answer, look = (answering_seconds(c, samples[fullest], 1_000_000) for c in (config, once))
    step = min(spent[1:], default=math.inf) * config.accumulate
    return Costs(step, memory, room, answer, look, process_count())


# %%
def span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_costs(costs: Costs, config: Config, steps: int, looks: float) -> str:
    """Steps, time and memory of a training in a few lines.

    Args:
        steps: updates of the weights that are left.
        looks: megapixels in all looks at the validation part that are left.
    """
    where = f"in {costs.processes} processes" if costs.processes > 1 else "here"
    lines = [f"{steps:,} steps"]
    if math.isfinite(costs.step):
        lines[0] += f" of {1000 * costs.step:.0f} ms {where}: {span(steps * costs.step)}"
    lines[0] += f", and {span(looks * costs.look)} for looks at the validation part"
    if config.train_hours:
        lines.append(f"ends after {config.train_hours:g} h of training at the latest")
    if costs.memory == math.inf:
        lines.append("A batch does not fit into the GPU's memory: it will be computed in parts,")
        lines.append("which is slower. Lower batch_size, crop or scale.")
    elif costs.room:
        lines.append(f"a step takes {costs.memory:.1f} of the GPU's {costs.room:.1f} GB")
    return "\n".join(lines)
