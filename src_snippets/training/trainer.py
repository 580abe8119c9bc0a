"""Training: one step, the loop over epochs, checkpoints, exact resume."""

# %% [markdown]
# ### The training loop
# A step is: the losses of a batch, backward, clip, update; accelerate takes care of devices, mixed
# precision and several GPUs. The whole state goes to `last.pt` after an epoch, once five
# minutes have passed, and at evaluations (on a Drive hourly, in between to the local disk), the
# weights of the best epoch (see `best_by`) to `best.pt`. A stopped run continues from there with
# the same draws, since those of each epoch depend on the seed and its number alone.

# %%
# @title Session, optimizer, learning rate, batches, memory
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
import json
from math import ceil, cos, inf, isfinite, pi, sqrt
import os
from pathlib import Path
import signal
from tempfile import gettempdir
import time

import accelerate
import numpy as np
import pandas as pd
from psutil import Process
import timm
import torch
from torch import nn
from tqdm.auto import tqdm

from src_snippets.data.structures import CellSample, coco_ground_truth
from src_snippets.data.transforms import collate, training_target, TrainingSet
from src_snippets.model.backbone import backbone_stages
from src_snippets.model.detect import detect, LOW_SCORE
from src_snippets.model.mask_rcnn import build_model, to_device
from src_snippets.setup.config import Config
from src_snippets.setup.devices import (
    all_max,
    autocast_for,
    broadcast,
    choose_precision,
    default_device,
    free_memory,
    gather,
    is_main,
    is_out_of_memory,
    launch,
    rank,
    rank_indices,
    world_size,
)
from src_snippets.setup.files import atomic_write, DRIVE, KAGGLE_WORKING, keep_going
from src_snippets.training.checkpoints import (
    check_same_settings,
    copy_newer,
    open_run,
    save_checkpoint,
)
from src_snippets.training.metrics import average_precision


class Session:
    """When training has to stop: at SIGTERM, or when 85% of `max_hours` (see `Config`) are over."""

    def __init__(self, max_hours: float):
        max_hours = max_hours if max_hours >= 0 else 8.8 * KAGGLE_WORKING.is_dir()
        self.end = Process().create_time() + (0.85 * 3600 * max_hours or inf)  # the rest: predict
        self.terminated = False

    def is_over(self) -> bool:
        return self.terminated or time.time() >= self.end

    @contextmanager
    def listen(self):
        """Inside, SIGTERM, by which a machine is taken back, only ends training."""
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer, with `lr_factors` and `layer_decay`; norms and biases do not decay."""
    (stem, body, fpn, heads), net = config.lr_factors, model.backbone
    lr = config.lr * sqrt(world_size() if config.scale_lr else 1)
    parts = [(fpn, [net.attention, net.fpn]), (heads, [model.rpn, model.roi_heads])]
    stages = backbone_stages(net.body)
    for depth, stage in enumerate(reversed(stages)):  # the highest stage has the whole factor
        factor = stem if depth > 0 and depth == len(stages) - 1 else body
        parts.append((factor * config.layer_decay**depth, stage))
    groups = []
    for factor, modules in parts:
        weights = [p for module in modules for p in module.parameters() if p.requires_grad]
        for decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
            own = [p for p in weights if (p.ndim > 1) == is_matrix]
            groups += [dict(params=own, lr=factor * lr, weight_decay=decay)] if own else []
    sgd = partial(torch.optim.SGD, momentum=0.9)
    kinds = dict(adamw=torch.optim.AdamW, adam=torch.optim.Adam, sgd=sgd)
    return kinds[config.optimizer](groups, fused=True)


def lr_factor(step: int, total: int, config: Config, history: list[dict]) -> float:
    """The factor 0..1 of learning rates at a step out of `total`: linear warm-up, `schedule`."""
    warmup = min(config.warmup_steps, total // 5)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + cos(pi * (step - warmup) / max(total - warmup, 1)))
    factor, best, waited, is_plateau = 1.0, inf, 0, config.schedule == "plateau"
    for loss in (row["val_loss"] for row in history if is_plateau and "val_loss" in row):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == 3:  # evaluations in a row without a lower loss
            factor, waited = factor / 10, 0
    return factor


def evaluation_scores(history: list[dict], best_by: str) -> list[float]:
    """The score of each evaluation, higher is better; none for `last`; -inf: loss is not finite."""
    if best_by == "loss":
        losses = [row["val_loss"] for row in history if "val_loss" in row]
        return [-loss if isfinite(loss) else -inf for loss in losses]
    return [row[best_by] or 0.0 for row in history if best_by in row]


def stop_reason(history: list[dict], seconds: float, config: Config) -> str:
    """The reason to stop after a history that took so many seconds; "" to go on."""
    metric, patience = config.best_by if config.best_by != "last" else "AP50", config.patience
    scores = evaluation_scores(history, metric)
    if patience and scores[:-patience] and max(scores[-patience:]) < max(scores[:-patience]):
        return f"no better {metric} in {patience} evaluations"
    if config.train_hours and seconds >= 3600 * config.train_hours:
        return f"train_hours={config.train_hours:g} are over"
    return "all epochs are done" if len(history) >= config.epochs else ""


def training_loader(samples, config: Config, batch_size: int) -> torch.utils.data.DataLoader:
    """Shuffled batches of augmented crops, made by other processes while a GPU computes."""
    on_gpu, workers, forks = default_device().type == "cuda", config.workers, hasattr(os, "fork")
    if workers < 0:
        workers = min(os.cpu_count() // world_size(), 4) if on_gpu and forks else 0
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu)
    options |= dict(collate_fn=collate, shuffle=True)
    options["drop_last"] = len(samples) >= batch_size * world_size()
    if workers and forks:  # a notebook's classes cannot be sent; SIGTERM is for the trainer alone
        options["multiprocessing_context"] = "fork"
        options["worker_init_fn"] = lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return torch.utils.data.DataLoader(TrainingSet(samples, config), batch_size, **options)


def try_step(model: nn.Module, config: Config, batch_size: int, copies: int) -> None:
    """Take a step on crops full of instances, so that too little memory shows before training.

    copies: of the weights, to keep room for (Adam's two, others). Leaves all as it was.
    """
    row, device = torch.arange(config.crop) // 24, default_device()
    ids = (row[:, None] * (row[-1] + 1) + row + 1).int()[None]  # a grid of instances of 24 px
    image, labels = torch.zeros(3, *ids.shape[1:]).byte(), torch.ones(int(ids.max())).long()
    pair = image, training_target(CellSample(image, ids, labels))
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] * (device.type == "cuda")):
        batch = accelerate.utils.send_to_device(collate([pair] * batch_size), device)
        state = [torch.zeros_like(p) for p in model.parameters() for _ in range(copies)]
        sum(model.train()(*batch).values()).backward()
    del batch, state
    model.zero_grad()
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    free_memory()


# %%
# @title Evaluation, and what a checkpoint holds
@torch.no_grad()
def validation_loss(model: nn.Module, samples, config: Config) -> float:
    """Mean loss on the middle `crop` px, with the same draws each time, norms as in prediction."""
    model.eval()
    for part in (model, model.rpn, model.roi_heads):
        part.training = True  # these compute losses; the layers inside stay in eval mode
    losses, device = [], default_device()
    for i in rank_indices(len(samples)):
        torch.manual_seed(config.seed + i)  # each epoch of training sets its own
        sample = samples[i]
        top, left = (max(side - config.crop, 0) // 2 for side in sample.size)
        window = np.s_[..., top : top + config.crop, left : left + config.crop]
        sample = replace(sample, image=sample.image[window], layers=sample.layers[window])
        batch = collate([(sample.image, training_target(sample))])
        with autocast_for(config, device):
            batch = accelerate.utils.send_to_device(batch, device)
            losses.append(float(sum(model(*batch).values())))
    model.eval()
    return np.mean(gather(losses))


def evaluate(model: nn.Module, samples, config: Config) -> tuple[dict, tuple]:
    """Evaluate on whole, unaugmented images, from `LOW_SCORE` on.

    Returns AP, AP50, AP75 (0..1, uncapped, None without ground truth), val_loss where a setting
    needs it (on the middle crop); the sample with most instances and its predictions.
    """
    config = replace(config, tile=0, score_threshold=min(config.score_threshold, LOW_SCORE))
    images = (samples[i].image for i in rank_indices(len(samples)))
    predictions = gather([detect([model], image, config) for image in images])
    truth = coco_ground_truth(samples, dict(enumerate(config.class_names, start=1)))
    scores = average_precision(truth, dict(enumerate(predictions, start=1)))
    row = {name: scores[name] for name in ("AP", "AP50", "AP75")}
    if config.best_by == "loss" or config.schedule == "plateau":
        row["val_loss"] = validation_loss(model, samples, config)
    index = int(np.bincount([a["image_id"] for a in truth["annotations"]] or [1]).argmax()) - 1
    return row, (samples[index], predictions[index].above(config.export_score_threshold))


MAX_BAD_STEPS = 10  # in a row; those while fp16 searches its first scale do not count
SAVE_SECONDS = 300  # between two `last.pt`, at least; evaluations, the last epoch write it too
PROGRESS = ("history", "steps", "max_steps", "seconds")  # in last.pt


class TrainingState:
    """Model, optimizer, EMA, scaler and history of a run, new or as in the folder's `last.pt`."""

    def __init__(self, config: Config, folder: Path, resume: bool):
        self.config, self.folder = config, Path(folder)
        self.history, self.steps, self.max_steps, self.seconds = [], 0, 0, 0.0
        path = self.folder.resolve()  # a Drive's bin fills up: it gets copies, hourly
        is_on_drive, local = path.is_relative_to(DRIVE), Path(gettempdir(), *path.parts[1:])
        self.local = local if is_on_drive else self.folder
        self.copied, self.saved = time.time(), time.time()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's
        options = dict(use_seedable_sampler=True, data_seed=config.seed, non_blocking=True)
        self.accelerator = accelerate.Accelerator(
            cpu=default_device().type == "cpu",
            mixed_precision=choose_precision(config, default_device()),
            dataloader_config=accelerate.DataLoaderConfiguration(**options),
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        state = broadcast(open_run, self.folder, self.local, resume)
        self.model = build_model(config, state is None and is_main())
        self.model.load_state_dict(broadcast(self.model.state_dict))  # DDP leaves the buffers
        optimizer = build_optimizer(to_device(self.model), config)
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.parts, self.best_model = dict(model=self.model, optimizer=optimizer), self.model
        if config.ema:  # with a warm-up, by which the first weights are soon forgotten
            ema = timm.utils.ModelEmaV3(self.model, config.ema, use_warmup=True, warmup_power=0.75)
            self.parts["ema"], self.best_model = ema, ema.module
        if self.accelerator.scaler:
            self.parts["scaler"] = self.accelerator.scaler
        if state:
            check_same_settings(state["config"], config, self.folder / "last.pt")
            for name in self.parts.keys() & state.keys():
                self.parts[name].load_state_dict(state[name])
            for weight, moments in optimizer.state.items():  # saved in another memory format
                own = {k: v for k, v in moments.items() if v.shape == weight.shape}
                moments |= {k: torch.empty_like(weight).copy_(v) for k, v in own.items()}
            vars(self).update({name: state[name] for name in PROGRESS})
        self.network, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def statistics(self, *models) -> list[torch.Tensor]:
        """Running means and variances of the norms of models, of the trained one by default."""
        buffers = [buffer for model in models or [self.model] for buffer in model.buffers()]
        return [buffer for buffer in dict.fromkeys(buffers) if buffer.is_floating_point()]

    def save_best(self) -> None:
        """Write `best.pt`: the weights that are evaluated, with settings and history."""
        content = dict(model=self.best_model.state_dict(), history=self.history)
        save_checkpoint(content | dict(config=asdict(self.config)), self.local / "best.pt")

    def save(self, is_last: bool) -> None:
        """Write the files after an epoch; of equal scores the last is the best."""
        with keep_going("history.csv"), atomic_write(self.local / "history.csv") as partial:
            pd.DataFrame(self.history).to_csv(partial, index=False)
        is_scored = "AP50" in self.history[-1]
        if is_scored or is_last or time.time() >= self.saved + SAVE_SECONDS:
            self.saved, scores = time.time(), evaluation_scores(self.history, self.config.best_by)
            if not scores or (is_scored and scores[-1] == max(scores)):  # without scores the last
                self.save_best()
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {name: getattr(self, name) for name in PROGRESS}
            save_checkpoint(state | dict(config=asdict(self.config)), self.local / "last.pt")
        if time.time() >= self.copied + 3600:
            self.copy_out()

    def copy_out(self) -> None:
        """Copy what is newer on the local disk, if it is another one; show an error and go on."""
        self.copied = time.time()
        with keep_going(f"The copy of {self.local} to {self.folder}"):
            if is_main():
                copy_newer(self.local, self.folder)


# %%
# @title Trainer: step, epoch, fit
class Trainer(TrainingState):
    """Train a model, or continue the run in `folder`; `resume=False` trains anew.

    Without `val` (samples) the last epoch is the best. At the end of `session` training stops; the
    same call continues it later. callback: called in the main process with (history, example,
    is_last) after each epoch and at the end; example: a validation sample and its predictions.
    """

    def __init__(self, config, samples, val, folder, session=None, callback=None, resume=True):
        super().__init__(config, folder, resume)
        self.train_samples, self.val_samples = samples, val
        self.session, self.callback, self.example = session or Session(0.0), callback, None
        self.bad_steps, self.pending = 0, []  # in a row; losses and names since the last update

    def step(self, images, targets) -> list[dict]:
        """Learn from a batch; return the losses of those that have changed the weights now."""
        with self.accelerator.accumulate(self.network):
            losses = self.network(images, targets)
            # Add your own loss: losses["loss_mine"] = .. (of logits: in CellRoIHeads.forward)
            self.accelerator.backward(sum(losses.values()))
            values = self.accelerator.reduce(torch.stack([*losses.values()]).detach(), "mean")
            losses = dict(zip(losses, values.tolist(), strict=True))
            self.pending.append((losses, ", ".join(target["name"] for target in targets)))
            return self.update() if self.accelerator.sync_gradients else []

    def update(self) -> list[dict]:
        """Update the weights, unless the gradients, equal in all processes, are not finite."""
        losses, names = zip(*self.pending, strict=True)
        self.pending, max_norm = [], self.config.clip_norm or inf
        if self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm).isfinite():
            factor = lr_factor(self.steps, self.total_steps, self.config, self.history)
            for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
                group["lr"] = factor * peak
            self.optimizer.step()
            self.steps, self.bad_steps = self.steps + 1, 0
            self.good_statistics = [values.clone() for values in self.statistics()]
            if self.config.ema:
                self.parts["ema"].update(self.model, self.steps)
        else:
            scaler, finite = self.accelerator.scaler, all(isfinite(sum(v.values())) for v in losses)
            self.bad_steps += not (scaler and finite and not self.steps and scaler.get_scale() > 1)
            message = f"Gradients are not finite on {', '.join(gather(list(names)))}: {losses}"
            if self.bad_steps == MAX_BAD_STEPS:
                hint = "in a row. Earlier epochs are kept. Lower lr, or set precision='no'."
                raise FloatingPointError(f"{message}, {MAX_BAD_STEPS} times {hint}")
            for values, good in zip(self.statistics(), self.good_statistics, strict=True):
                values.copy_(good)
            if scaler:
                scaler.update(scaler.get_scale() / 2)
            if not (scaler and finite):
                tqdm.write(f"{message}: this step is skipped.")  # else fp16's scale was too high
            losses = []
        self.optimizer.zero_grad()
        return list(losses)

    def run_epoch(self, epoch: int, bar) -> None:
        """Train an epoch, evaluate if due; one cut by the session's end is made again."""
        config, begin, losses = self.config, self.started, []
        limit, steps = 3600 * config.train_hours or inf, self.steps
        torch.manual_seed(config.seed + 1_000_003 * epoch + 7919 * rank())  # augmentation, sampling
        self.loader.set_epoch(epoch)  # order of the images
        self.loader.dataset.epoch.fill_(epoch)
        self.model.train()
        self.good_statistics = [values.clone() for values in self.statistics()]
        for images, targets in self.loader:
            spent, is_over = all_max((time.perf_counter() - begin) / limit, self.session.is_over())
            if spent and self.steps:  # the schedule ends with the steps that fit into `train_hours`
                self.total_steps = min(self.steps / min(spent, 1), self.max_steps)
                bar.total = ceil(bar.n * self.total_steps / self.steps)
                if hasattr(bar, "container"):  # a notebook's, which keeps its own
                    bar.container.children[1].max = bar.total
            losses += self.step(images, targets)
            bar.update()
            bar.set_postfix(losses[-1] if losses else {}, refresh=False)
            if spent >= 1 or is_over:
                break
        for values in self.statistics(self.model, self.best_model):
            values.copy_(self.accelerator.reduce(values, "mean"))  # processes saw other images
        is_over = all_max(self.session.is_over())[0]
        if is_over and is_main() and not (self.local / "best.pt").exists():
            self.save_best()
        if is_over or not losses:  # no step, as at first where fp16's scale is too high: once more
            self.steps = steps  # or the schedule would count them twice
            return
        row = dict(epoch=epoch, lr=max(group["lr"] for group in self.optimizer.param_groups))
        row |= {name: np.mean([step[name] for step in losses]) for name in losses[0]}
        row["loss"] = np.mean([sum(step.values()) for step in losses])
        if scaler := self.accelerator.scaler:
            row["scale"] = scaler.get_scale()
            if row["scale"] < 1:
                bar.write(f"WARNING: fp16 scale {row['scale']:g}, below 1: set precision='no'.")
        self.seconds = all_max(time.perf_counter() - begin)[0]
        is_last = self.seconds >= limit or epoch == config.epochs
        if len(self.val_samples) and (epoch % config.eval_every == 0 or is_last):
            scores, self.example = evaluate(self.best_model, self.val_samples, config)
            row |= scores
            self.seconds = all_max(time.perf_counter() - begin)[0]
        # Through JSON, or equal values of a resumed run would pickle to other bytes
        self.history = json.loads(json.dumps([*self.history, row]))
        torch.cuda.empty_cache()  # images differ in size: what it holds may not fit the next

    def fit(self, batch_size: int = 0) -> list[dict]:
        """Train to the end, or the session's; return the history. batch_size 0: of the settings."""
        config, batch_size = self.config, batch_size or self.config.batch_size
        start = len(self.history)
        if reason := stop_reason(self.history, self.seconds, config):
            print(f"ALREADY TRAINED ({reason}): {self.folder} is used. RESUME = False trains anew.")
        elif start:
            print(f"{self.folder}: {start} of {config.epochs} epochs are done, training continues.")
        if default_device().type == "cuda" and not reason:
            torch.cuda.set_per_process_memory_fraction(0.85)  # the margin of the trial step
            try_step(self.model, config, batch_size, 1 if start else 3)  # Adam keeps two
            torch.cuda.set_per_process_memory_fraction(0.95)  # Windows would swap to RAM, slowly
        accumulate = config.accumulate * config.batch_size // batch_size
        if batch_size < config.batch_size:
            print(f"The GPU's memory was full: {batch_size=}, {accumulate=} from now on.")
        self.accelerator.gradient_accumulation_steps = accumulate
        loader = training_loader(self.train_samples, config, batch_size)
        self.loader = self.accelerator.prepare(loader)
        batches = len(self.loader)
        max_steps = config.epochs * ceil(batches / accumulate)
        self.steps = round(self.steps * max_steps / (self.max_steps or max_steps))  # by other GPUs
        self.max_steps = self.total_steps = max_steps
        if not reason:
            crops, gpus = batch_size * accumulate * world_size(), config.scale_lr * world_size()
            root = f" times the root of {gpus}" if gpus > 1 else ""
            print(f"At most {self.max_steps:,} steps of {crops} crops, lr {config.lr:g}{root}")
        options = dict(total=config.epochs * batches, initial=start * batches, unit="batch")
        bar = tqdm(desc="training", disable=not is_main() or bool(reason), mininterval=2, **options)
        self.started = time.perf_counter() - self.seconds
        with self.session.listen(), bar:
            while not reason:
                done = len(self.history)
                self.run_epoch(done + 1, bar)
                reason = stop_reason(self.history, self.seconds, config)
                if not reason and all_max(self.session.is_over())[0]:
                    reason = "the session ends (its max_hours, or SIGTERM); restart to go on"
                if is_main() and len(self.history) > done:  # not cut, half trained
                    self.save(is_last=bool(reason))
                    if self.callback:
                        self.callback(self.history, self.example, False)
                if reason:
                    bar.write(f"Training ends after epoch {len(self.history)}: {reason}.")
        if self.callback and is_main() and self.history:
            self.callback(self.history, self.example, True)
        return self.history


# %%
# @title launch_training, and train, which it starts in each process
def train(*arguments, batch_size: int = 0) -> list[dict]:
    """The history of `Trainer(*arguments).fit()` with `batch_size`, 0: that of the settings."""
    run = Trainer(*arguments)
    try:
        return run.fit(batch_size)
    finally:  # after an error too
        run.copy_out()


def launch_training(config, samples, val, folder, session, callback, resume) -> list[dict]:
    """Run `train` in a process per GPU; where memory is full, again with half the batch."""
    batch_size = config.batch_size
    while True:
        arguments = config, samples, val, folder, session, callback, resume
        try:
            return launch(config, partial(train, batch_size=batch_size), *arguments)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                message = "The GPU's memory does not suffice for one crop: lower crop or scale"
                raise RuntimeError(f"{message} ({str(error).strip()[-200:]}).") from None
        finally:
            free_memory()
        batch_size, resume = batch_size // 2, True
        time.sleep(10)  # the loaders of a process that was killed hold its memory for 5 s
