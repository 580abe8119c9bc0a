"""Training: one epoch, the fit loop, checkpoints."""

# %% [markdown]
# ## How does it learn?
# One step is: losses of a batch, backward, clip, update. accelerate takes care of devices and of
# mixed precision. After each epoch everything is written to `last.pt`, and the weights of the
# best epoch to `best.pt`; a stopped run goes on from there.

# %%
from collections import Counter
from collections.abc import Sequence
import csv
from dataclasses import asdict, replace
import gc
from itertools import pairwise
import json
import math
import os
from pathlib import Path
import signal
from statistics import mean
import time

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
import psutil
import torch
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from tqdm.auto import tqdm

from src_snippets.backbones import stage_groups
from src_snippets.checkpoints import (
    as_config,
    check_same_settings,
    latest_state,
    load_checkpoint,
    NOT_TRAINED,
    save_checkpoint,
)
from src_snippets.config import Config
from src_snippets.evaluate import average_precision
from src_snippets.forms import CellSample, coco_truth, Instances
from src_snippets.model import build_model, choose_precision, load_model_state
from src_snippets.places import written_whole
from src_snippets.plots import epoch_line
from src_snippets.predict import detect_together, LEAST_TILE, seen_once
from src_snippets.processes import (
    default_device,
    from_first,
    gathered,
    highest,
    is_first,
    make_equal,
    own_turns,
    process_count,
    process_index,
    summed,
)
from src_snippets.stains import as_seen
from src_snippets.transforms import collate, magnification, training_target, TrainingSet


# %%
def rate_groups(model: nn.Module, config: Config) -> list[tuple[float, list[nn.Parameter]]]:
    """Parts of the model with what their rate is multiplied with: see `group_lr`, `layer_decay`.

    The stem and each stage of the trunk are parts of their own, then come attention and pyramid
    (the neck), and proposals and heads. The highest stage has the trunk's whole rate, each one
    below `layer_decay` of it.
    """
    stem, trunk, neck, heads = config.group_lr
    groups = stage_groups(model.backbone.body)
    parts = []
    for depth, group in enumerate(reversed(groups)):
        share = stem if depth == len(groups) - 1 else trunk
        parts.append((share * config.layer_decay**depth, group))
    parts.append((neck, [model.backbone.attention, model.backbone.fpn]))
    parts.append((heads, [model.rpn, model.roi_heads]))
    learned = [(share, [p for m in part for p in m.parameters()]) for share, part in parts]
    return [(share, [p for p in part if p.requires_grad]) for share, part in learned]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), Adam or SGD; one-dimensional parameters are not decayed.

    These are norms and biases. All parameters are updated by one kernel.
    """
    groups = []
    for share, part in rate_groups(model, config):
        rate = dict(lr=config.lr * share)
        groups.append(dict(params=[p for p in part if p.ndim > 1], **rate))
        groups.append(dict(params=[p for p in part if p.ndim <= 1], weight_decay=0.0, **rate))
    groups = [group for group in groups if group["params"]]
    options = dict(lr=config.lr, weight_decay=config.weight_decay, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **options)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, **options)


# %%
def rate_factor(step: int, config: Config, total: int) -> float:
    """What the highest rate is multiplied with at a step, 0..1.

    A warm-up over `warmup_steps` (at most a fifth of the run), then constant (plateau too: see
    `plateau_factor`) or a half cosine down to 0 at step `total`. `one_cycle` is torch's
    `OneCycleLR`: over three tenths of the run up from a 25th, then down to nearly 0.
    """

    def half_cosine(share):
        return 0.5 * (1 + math.cos(math.pi * share))

    if config.schedule == "one_cycle":
        top = max(0.3 * total - 1, 1)
        if step <= top:
            return 1 - 0.96 * half_cosine(step / top)
        return 4e-6 + (1 - 4e-6) * half_cosine(min((step - top) / max(total - 1 - top, 1), 1))
    warmup = min(config.warmup_steps, total // 5)
    if step < warmup:
        rise = (step + 1) / warmup
        return rise if config.warmup == "linear" else 1 - half_cosine(rise)
    if config.schedule != "cosine":
        return 1.0
    return half_cosine((step - warmup) / max(total - warmup, 1))


# %%
def plateau_factor(history: list[dict], patience: int) -> float:
    """A tenth for each time that `patience` looks in a row had no lower validation loss."""
    best, waited, factor = math.inf, 0, 1.0
    for loss in (row["val_loss"] for row in history if "val_loss" in row):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            factor, waited = factor / 10, 0
    return factor


def scheduled(step: int, config: Config, total: int, history: list[dict]) -> float:
    """What rates are multiplied with at a step, given the epochs before it."""
    factor = rate_factor(step, config, total)
    if config.schedule == "plateau":
        factor *= plateau_factor(history, config.plateau_patience)
    return factor


def epoch_scores(history: list[dict], best_by: str) -> list[float]:
    """How good each look at the validation part was; higher is better, nothing to score is 0."""
    if best_by == "loss":
        return [-row["val_loss"] for row in history if "val_loss" in row]
    return [row[best_by] or 0.0 for row in history if best_by in row]


def has_stalled(history: list[dict], config: Config) -> bool:
    """Whether the last `patience` looks at the validation part were all below an earlier one."""
    scores = epoch_scores(history, config.best_by)
    if not config.patience or len(scores) <= config.patience:
        return False
    return max(scores[-config.patience :]) < max(scores[: -config.patience])


# %%
def training_loader(samples, config: Config, device: torch.device) -> DataLoader:
    """Shuffled batches of augmented crops.

    With a GPU, worker processes augment while it computes; on a CPU they would only compete.
    """
    gpu = device.type == "cuda"
    workers = config.workers if config.workers >= 0 else min(os.cpu_count(), 4) * gpu
    return DataLoader(
        TrainingSet(samples, config),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=len(samples) >= config.batch_size * process_count(),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=gpu,
    )


# %% [markdown]
# Each loss is a mean over what was sampled, and one process may have sampled more than another:
# losses are weighted so that the mean over processes is that over all samples of the whole batch.

# %%
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


def loss_weights(model: nn.Module, device: torch.device, computed: bool) -> Tensor:
    """What each of `LOSSES` is multiplied with before the mean over processes is taken.

    Args:
        computed: whether this process has losses; each takes part, or the others would wait.

    Returns:
        (5,) float32, all 1 with a single process.
    """
    if process_count() == 1:
        return torch.ones(len(LOSSES), device=device)
    own = torch.zeros(len(LOSSES), device=device)
    if computed:
        heads, anchors = model.roi_heads, model.rpn.fg_bg_sampler.drawn
        drawn = [heads.fg_bg_sampler.drawn] * 2 + [heads.masks_drawn] + [anchors] * 2
        own += torch.stack([torch.as_tensor(n, device=device) for n in drawn])
    return own * process_count() / summed(own.clone()).clamp(min=1)


class Attempt:
    """Does one thing after the other until memory does not suffice; then nothing more.

    With norms over all processes there is no other try: they wait for each other inside.
    """

    def __init__(self, model: nn.Module):
        waits = any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
        self.full, self.once = False, waits and process_count() > 1

    def __call__(self, work, *arguments):
        """The result of the work; None where memory is full."""
        if not self.full:
            try:
                return work(*arguments)
            except torch.OutOfMemoryError:
                if self.once:
                    raise
                self.full = True
        return None


# %%
def add_gradients(model, images, targets, accelerator, parts: int) -> dict[str, float]:
    """Adds the gradients of a batch, computed in parts; returns the mean of each loss.

    With several processes losses are means over all of them, gradients still those of this one.

    Raises:
        torch.OutOfMemoryError: memory does not suffice here or in another process.
    """
    size, attempt = len(images), Attempt(model)
    device = accelerator.device
    sums = torch.zeros(len(LOSSES) + 1, device=device)
    cuts = [size * k // min(parts, size) for k in range(min(parts, size) + 1)]
    for begin, end in pairwise(cuts):
        found = attempt(model, images[begin:end], targets[begin:end])
        weights = loss_weights(model, device, found is not None)
        if found is not None:
            losses = torch.stack([found[name] for name in LOSSES]) * weights * (end - begin) / size
            attempt(accelerator.backward, losses.sum())
            sums[:-1] += losses.detach()
        found = losses = None  # or they would be held while the next part is computed
    sums[-1] = attempt.full
    # Read only now: a GPU has the backward pass to do while the numbers are fetched.
    *values, full = summed(sums).div_(process_count()).tolist()
    if full:
        raise torch.OutOfMemoryError(
            f"The GPU's memory does not suffice for a batch of {size} in {len(cuts) - 1} parts. "
            "Lower crop, scale, rois or proposals, or choose a smaller backbone."
        )
    return dict(zip(LOSSES, values, strict=True))


# %%
MOST_BAD = 10  # batches in a row whose loss is not finite


def skip_batch(values: dict, targets: list[dict], times: int, tell) -> None:
    """Tells that a batch is skipped; raises FloatingPointError where it is the tenth in a row."""
    every = gathered([", ".join(target["name"] for target in targets)])  # of all processes
    found = f"Losses {values} on images {', '.join(every)}"
    tell(f"{found}: this batch is skipped.")
    if times >= MOST_BAD:
        raise FloatingPointError(
            f"{found}: {times} batches in a row had losses that are not finite. Training has "
            "stopped; the checkpoints are of earlier epochs. Lower lr, or set precision='no'."
        )


def copy_values(targets: list, sources: list) -> None:
    """Copies tensors into others by one kernel; there may be none, as without batch norms."""
    if targets:
        torch._foreach_copy_(targets, sources)


# %%
class StepGuard:
    """Adds the gradients of a batch, though memory may not suffice or losses not be finite.

    Args:
        model: its buffers (means of norms) and the gradients of earlier batches are put back after
            a batch that went wrong.

    Attributes:
        parts: into how many a batch is cut, its gradients added up; more once memory ran out.
        bad: batches in a row whose loss was not finite.
    """

    def __init__(self, model: nn.Module, parts: int = 1):
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.kept = [b.clone() for b in self.buffers]
        self.weights, self.parts, self.bad = list(model.parameters()), parts, 0

    def put_back(self, grads) -> None:
        """Undoes what a batch did to buffers and gradients."""
        copy_values(self.buffers, self.kept)
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = None if grad is None else grad.clone()

    def tried(self, model, images, targets, accelerator, tell) -> dict | None:
        """As `add_gradients`; None where the batch has to be skipped.

        Raises:
            FloatingPointError: `MOST_BAD` batches in a row were skipped.
            torch.OutOfMemoryError: memory does not even suffice for a single crop.
        """
        # There are none but where the gradients of several batches are added up for one step.
        grads = [None if weight.grad is None else weight.grad.clone() for weight in self.weights]
        while True:
            try:
                values = add_gradients(model, images, targets, accelerator, self.parts)
                break
            except torch.OutOfMemoryError:
                self.put_back(grads)
                if self.parts >= len(images):
                    raise
                self.parts *= 2
                tell(f"The GPU's memory is full: batches are computed in {self.parts} parts now.")
            free_memory()  # not in the handler, which still holds what did not fit
        if all(map(math.isfinite, values.values())):
            copy_values(self.kept, self.buffers)
            self.bad = 0
            return values
        self.put_back(grads)
        self.bad += 1
        skip_batch(values, targets, self.bad, tell)
        if accelerator.scaler is not None:
            accelerator.scaler.update(accelerator.scaler.get_scale() / 2)
        return None


# %%
def average_rate(step: int, decay: float) -> float:
    """Share of the present weights that enters their running mean after a step, from 1 on.

    The mean forgets with `decay` a step, and faster in the beginning, when weights are still raw.
    """
    return 1 - min(decay, (1 + step) / (10 + step))


class WeightMean(AveragedModel):
    """A running mean of a model's weights; buffers are as in the model. See `average_rate`."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=self.mix)
        self.decay, self.step = decay, 0

    def mix(self, means, weights, _) -> None:
        torch._foreach_lerp_(means, weights, average_rate(self.step, self.decay))

    def follow(self, model: nn.Module, step: int) -> None:
        """Takes the weights after a step into their mean."""
        self.step = step
        self.update_parameters(model)


# %%
def train_epoch(
    model, loader, optimizer, schedule, accelerator, config, bar, after_step=None, guard=None
) -> dict:
    """Trains for one pass over the loader, or until `after_step` says that it is enough.

    Args:
        schedule: stepped once an update of the weights; bar: counts batches.
        after_step: called after each update of the weights; True ends the pass.
        guard: a `StepGuard` of the model, by default a new one.

    Returns:
        The mean of each of `LOSSES`, and their sum as `loss`. Raises what `StepGuard` does.
    """
    means, guard = {}, guard or StepGuard(model)
    model.train()
    for images, targets in loader:
        with accelerator.accumulate(model):
            values = guard.tried(model, images, targets, accelerator, bar.write)
            if grads := [w.grad for w in guard.weights if w.grad is not None]:
                if accelerator.sync_gradients:
                    make_equal(grads)
                if config.clip_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(guard.weights, config.clip_norm)  # unscales
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                schedule.step()
            enough = bool(after_step and accelerator.sync_gradients and after_step())
        bar.update()
        if values is not None:
            for name, value in [*values.items(), ("loss", sum(values.values()))]:
                means.setdefault(name, MeanMetric()).update(value, len(images))
            parts = {name.removeprefix("loss_"): f"{value:.2f}" for name, value in values.items()}
            bar.set_postfix(parts | {"rate": f"{max(schedule.get_last_lr()):.1e}"}, refresh=False)
        if enough:
            break
    if not means:
        raise FloatingPointError("Every batch of the epoch was skipped: see the lines above.")
    return {name: float(m.to(accelerator.device).compute()) for name, m in means.items()}


# %%
def validate(model, samples: Sequence[CellSample], config: Config) -> list[Instances]:
    """Detections on whole, unaugmented fields shown once, one `Instances` a sample, in order."""
    once = seen_once(config)
    own = [samples[i].image for i in own_turns(len(samples))]
    return gathered([detect_together([(model, once)], image, once) for image in own])


def quarters(sample: CellSample) -> list[CellSample]:
    """A field cut into four."""
    image, layers = sample.image, sample.layers
    sides = [(slice(0, length // 2), slice(length // 2, length)) for length in sample.size]
    places = [(..., rows, columns) for rows in sides[0] for columns in sides[1]]
    return [replace(sample, image=image[place], layers=layers[place]) for place in places]


def field_loss(model: nn.Module, sample: CellSample, config: Config) -> float:
    """The loss on a field; the mean of its quarters' where the GPU's memory does not suffice."""
    device = next(model.parameters()).device
    precision = choose_precision(config, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    target = training_target(sample, config.min_area)
    target = {key: value.to(device) for key, value in target.items()}
    try:
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            parts = model([as_seen(sample.image, config).to(device)], [target])
            return float(sum(parts.values()))
    except torch.OutOfMemoryError:
        if max(sample.size) < 2 * LEAST_TILE:
            raise
    return mean(field_loss(model, part, config) for part in quarters(sample))


# %%
@torch.no_grad()
def validation_loss(model: nn.Module, samples: Sequence[CellSample], config: Config) -> float:
    """Mean loss on whole, unaugmented fields; norms as in prediction, equal sampling."""
    model.eval()
    for part in (model, model.rpn, model.roi_heads):
        part.training = True  # these give losses; the layers within them stay as they are
    losses = []
    here = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(here):
            for i in own_turns(len(samples)):
                torch.manual_seed(config.seed + i)
                size = samples[i].size
                model.transform.fixed = magnification(size, config.scale, config.short_sides[-1])
                losses.append(field_loss(model, samples[i], config))
    finally:
        model.transform.fixed = None
        model.eval()
    return mean(gathered(losses))


def by_image_id(answers: Sequence[Instances]) -> dict[int, Instances]:
    """Answers keyed 1, 2, .. as `coco_truth` numbers images."""
    return dict(enumerate(answers, start=1))


# %%
def read_trained(path: Path, config: Config, same: bool = True) -> tuple[nn.Module, Config]:
    """Builds the model of a checkpoint with its weights.

    Args:
        path: a `best.pt`.
        config: its settings for prediction are used.
        same: refuse a checkpoint whose other settings differ; else it may be of any recipe.

    Returns:
        The model, and the settings it was made with, but for those of prediction.

    Raises:
        FileNotFoundError, BadInput, ValueError: no checkpoint, a broken one, other settings.
    """
    state = from_first(load_checkpoint, path)
    if same:
        check_same_settings(state["config"], config, path)
    answering = {name: getattr(config, name) for name in NOT_TRAINED}
    answering |= {} if same else {"precision": config.precision}  # that of another GPU
    own = replace(as_config(state["config"]), **answering)
    if own.num_classes != config.num_classes:
        raise ValueError(
            f"{path}: {own.num_classes} classes; the dataset has {config.num_classes}."
        )
    model = build_model(own, load_initial=False)
    load_model_state(model, state["model"])
    return model.eval(), own


def load_trained(path: Path, config: Config, same: bool = True) -> tuple[nn.Module, Config]:
    """`read_trained`, on the GPU if there is one."""
    model, own = read_trained(path, config, same)
    return model.to(default_device()), own


# %%
def write_history(history: list[dict], path: Path) -> None:
    """Writes one line an epoch as CSV; scores are empty in epochs without a validation."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with written_whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)


# %%
def build_accelerator(config: Config) -> Accelerator:
    """accelerate's view of the devices, with the precision and accumulation of the settings."""
    AcceleratorState._reset_state(reset_partial_state=True)  # precision may have been changed
    return Accelerator(
        cpu=default_device().type == "cpu",
        mixed_precision=choose_precision(config, default_device()),
        gradient_accumulation_steps=config.accumulate,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=config.seed, non_blocking=True
        ),
    )


def restore_run(run: "TrainingRun", state: dict) -> None:
    """Takes up the state of a checkpoint."""
    for name, part in run.parts.items():
        part.load_state_dict(state[name])
    if run.accelerator.scaler is not None and state["scaler"]:  # empty: begun without a GPU
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.history = state["history"]
    run.clock.spent, run.clock.is_over = state["spent"], state["is_over"]


# %%
class TrainingClock:
    """What is spent of `train_hours`; 0 sets no limit.

    Attributes:
        spent: seconds of all epochs before this one.
        is_over: whether the limit was reached, as seen at the last step.
    """

    def __init__(self, hours: float):
        self.limit, self.spent, self.is_over = 3600 * hours or math.inf, 0.0, False
        self.begun = time.perf_counter()

    def start_epoch(self) -> None:
        """Begins an epoch."""
        self.begun = time.perf_counter()

    def end_epoch(self) -> None:
        """Adds the epoch to what is spent."""
        self.spent += time.perf_counter() - self.begun

    def share(self) -> float:
        """How much of the limit is used, 0..1 and above."""
        return (self.spent + time.perf_counter() - self.begun) / self.limit


# %%
class Session:
    """When this session has to end: some hours after its process began, or when it is told to.

    Args:
        max_hours: 0 sets no limit.
        reserve: seconds that answering and writing need after training.
    """

    def __init__(self, max_hours: float, reserve: float = 0.0):
        self.hours, self.told = max_hours, False
        self.end = psutil.Process().create_time() + 3600 * max_hours if max_hours else math.inf
        self.end -= reserve
        self.until = self.end

    def listen(self) -> None:
        """Takes SIGTERM, by which machines are taken back, as the end of training, not of all."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told", True))

    def share(self, parts: int) -> None:
        """The next training may use one part of the time that is left."""
        left = self.end - time.time()
        self.until = time.time() + left / parts if math.isfinite(left) else math.inf

    def is_over(self) -> bool:
        """Whether training has to stop now."""
        return self.told or time.time() >= self.until

    def why(self) -> str:
        """What to tell the user."""
        return "SIGTERM" if self.told else f"max_hours={self.hours:g}"


# %%
class TrainingRun:
    """All that a checkpoint holds: model, optimiser, schedule, scaler, history and best score.

    Args:
        config: settings.
        folder: the run's folder, made if absent; where it holds `last.pt`, that is taken up.
        loader: the training loader, as `training_loader` makes it.
        session: when to stop before the end.
    """

    def __init__(self, config: Config, folder: Path, loader: DataLoader, session=None):
        self.config, self.folder, self.session = config, folder, session or Session(0.0)
        folder.mkdir(parents=True, exist_ok=True)
        self.history = []
        self.clock = TrainingClock(config.train_hours)
        self.accelerator = build_accelerator(config)
        if len(set(gathered([folder.name]))) > 1:
            raise ValueError(f"{folder.name}: other processes have other settings or images.")
        self.loader = self.accelerator.prepare(loader)
        state = from_first(latest_state, folder)
        model = build_model(config, load_initial=state is None and is_first())
        model.load_state_dict(from_first(model.state_dict))
        model.to(self.accelerator.device)
        optimizer = build_optimizer(model, config)
        self.most_steps = config.epochs * math.ceil(len(self.loader) / config.accumulate)
        self.total = self.most_steps  # the schedule's end: see `after_step`
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: scheduled(step, config, self.total, self.history)
        )
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        self.schedule = schedule
        if config.ema:
            self.parts["average"] = WeightMean(model, config.ema)
        if state is not None:
            check_same_settings(state["config"], config, folder / "last.pt")
            restore_run(self, state)
        self.guard, self.shown = StepGuard(model, state["parts"] if state else 1), None
        # Not wrapped for several processes: `make_equal` is what it would do, and waits for none
        # that ran out of memory.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare(optimizer)

    def after_step(self) -> bool:
        """Takes updated weights into their running mean; aims the schedule at the steps that fit.

        Returns:
            Whether to stop here.
        """
        step = self.parts["schedule"].last_epoch
        if "average" in self.parts:
            self.parts["average"].follow(self.parts["model"], step)
        share, ends = highest(self.clock.share(), self.session.is_over())
        self.clock.is_over = share >= 1
        self.total = math.ceil(min(self.most_steps, max(step / share, step) if share else math.inf))
        return self.clock.is_over or bool(ends)

    def answering(self) -> nn.Module:
        """The model that is measured and kept: the running mean where there is one."""
        return self.parts["average"].module if "average" in self.parts else self.parts["model"]


# %%
def session_ends(run: TrainingRun) -> bool:
    """Whether the session of any process is over."""
    return bool(highest(run.session.is_over())[0])


def make_norms_equal(run: TrainingRun) -> None:
    """Takes the mean over all processes of what norms have seen."""
    models = [part for part in run.parts.values() if isinstance(part, nn.Module)]
    make_equal([b for model in models for b in model.buffers() if b.is_floating_point()])
    copy_values(run.guard.kept, run.guard.buffers)


# %%
def save_best(run: TrainingRun, notes: dict) -> None:
    """Writes the weights that answer as `best.pt`, with the raw ones beside a running mean."""
    kept = {"model": run.answering().state_dict()}
    if "average" in run.parts:
        kept["raw"] = run.parts["model"].state_dict()
    save_checkpoint({**kept, **notes}, run.folder / "best.pt")


def save_epoch(run: TrainingRun, row: dict) -> None:
    """Adds an epoch to the history and writes `history.csv`, `last.pt`, perhaps `best.pt`.

    The best is the last one of the highest score, or the last where nothing is scored.
    """
    before = epoch_scores(run.history, run.config.best_by)
    run.history.append(row)
    scores = epoch_scores(run.history, run.config.best_by)
    is_best = not scores or (len(scores) > len(before) and scores[-1] >= max(scores))
    scaler = getattr(run.accelerator.scaler, "state_dict", dict)()  # empty without one
    state = {name: part.state_dict() for name, part in run.parts.items()}
    best = max(scores, default=None)
    # Through JSON, so that a run that was taken up pickles to the same bytes.
    rows = json.loads(json.dumps(run.history))
    notes = dict(config=asdict(run.config), history=rows, best=best)
    if is_first():
        write_history(run.history, run.folder / "history.csv")
    if is_first() and is_best:
        save_best(run, notes)
    run.clock.end_epoch()
    whole = dict(scaler=scaler, spent=run.clock.spent, is_over=run.clock.is_over)
    whole |= dict(parts=run.guard.parts)
    last, before = run.folder / "last.pt", run.folder / "before.pt"
    if is_first():
        save_checkpoint({**state, **notes, **whole}, last, before)


# %%
def run_epoch(run: TrainingRun, epoch: int, val_samples, truth: dict, bar) -> None:
    """Trains one epoch, validates when it is due, writes the checkpoints.

    An epoch in which the session ends is dropped, so that the next session goes on exactly as if
    there had been no end; only where there is no `best.pt` yet, it becomes that.
    """
    config = run.config
    run.clock.start_epoch()
    # Augmentation and sampling of this epoch, in each process others.
    torch.manual_seed(config.seed + 1_000_003 * epoch + 7919 * process_index())
    run.loader.set_epoch(epoch)  # order of the images
    parts = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    losses = train_epoch(*parts, config, bar, run.after_step, run.guard)
    make_norms_equal(run)
    if session_ends(run):
        if is_first() and not (run.folder / "best.pt").exists():
            save_best(run, dict(config=asdict(config), history=run.history, best=None))
        return
    row = dict(epoch=epoch, rate=max(run.schedule.get_last_lr()), **losses)
    last = epoch == config.epochs or run.clock.is_over
    if len(val_samples) and (epoch % config.eval_every == 0 or last):
        model = run.answering()
        answers = validate(model, val_samples, config)
        scores = average_precision(truth, by_image_id(answers))
        row |= {name: scores[name] for name in ("AP", "AP50", "AP75")}
        if config.best_by == "loss" or config.schedule == "plateau":
            row["val_loss"] = validation_loss(model, val_samples, config)
        place = fullest_image(truth)
        run.shown = val_samples[place], answers[place].above(config.show_floor)
    save_epoch(run, row)
    free_memory()  # crops differ in size; what the cache of a GPU holds may not fit the next


# %%
def fullest_image(truth: dict) -> int:
    """The place of the image with most cells in a COCO truth, 0 where there are none."""
    counts = Counter(row["image_id"] for row in truth["annotations"])
    return max(counts, key=counts.get, default=1) - 1


def free_memory() -> None:
    """Gives back what is no longer used, of the GPU's cache too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_epoch(history: Sequence[dict], _=None, is_last: bool = False) -> None:
    """Tells the last epoch of a history in a line."""
    if not is_last:
        tqdm.write(epoch_line(history[-1]))


# %%
def why_over(run: TrainingRun) -> str:
    """Why there is no epoch after the last, empty where there is one."""
    config = run.config
    if has_stalled(run.history, config):
        return f"No better {config.best_by} in {config.patience} looks"
    return f"train_hours={config.train_hours:g} are spent" if run.clock.is_over else ""


# %%
def fit(
    config: Config, train_samples, val_samples, folder: Path, session=None, watch=print_epoch
) -> list[dict]:
    """Trains a model, or goes on with the run that lies in `folder`.

    Args:
        train_samples, val_samples: of `CellSample`; without the latter `best.pt` is the last's.
        folder: gets `best.pt`, `last.pt`, `before.pt` and `history.csv`.
        session: a `Session`; its end stops training, and the same call goes on later.
        watch: called after each epoch, as `LiveHistory` is.

    Returns:
        One dictionary an epoch: epoch, rate, mean losses, and in epochs with a validation
        AP, AP50, AP75 (0..1, uncapped), and val_loss where a setting needs it.
    """
    loader = training_loader(train_samples, config, default_device())
    run = TrainingRun(config, folder, loader, session)
    if done := len(run.history):
        then = "going on from there" if done < config.epochs else "nothing is trained"
        print(f"{folder}: {done} of {config.epochs} epochs are done, {then}.")
    truth = coco_truth(val_samples, config.num_classes)
    steps = len(run.loader)
    options = dict(total=config.epochs * steps, initial=done * steps, disable=not is_first())
    with tqdm(desc="training", unit="batch", **options) as bar:
        for epoch in range(done + 1, config.epochs + 1):
            if reason := why_over(run):
                bar.write(f"{reason}: training ends.")
                break
            run_epoch(run, epoch, val_samples, truth, bar)
            if is_first() and len(run.history) == epoch:
                watch(run.history, run.shown)
            if session_ends(run):
                bar.write(f"{run.session.why()}: training stops after epoch {len(run.history)}.")
                bar.write("What is there answers; run again to go on.")
                break
    if (history := run.history) and is_first():
        watch(history, run.shown, is_last=True)
    del run  # the schedule refers to it: only a collection frees its model and optimiser
    free_memory()
    return history
