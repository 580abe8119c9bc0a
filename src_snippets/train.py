"""Training: one epoch, the fit loop, checkpoints."""

# %% [markdown]
# ## How does it learn?
# One step is: losses of a batch, backward, clip, update. accelerate takes care of the device and of
# mixed precision. After each epoch everything is written to `last.pt`, and the weights of the
# best epoch to `best.pt`; a stopped run goes on from there.

# %%
from collections.abc import Sequence
import csv
from dataclasses import asdict, fields, replace
import gc
import hashlib
import json
import math
import os
from pathlib import Path
import time

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from tqdm.auto import tqdm

from src_snippets.backbones import stage_groups
from src_snippets.config import Config
from src_snippets.evaluate import average_precision
from src_snippets.forms import CellSample, coco_truth, Instances
from src_snippets.model import build_model, choose_precision, detect, load_model_state
from src_snippets.places import written_whole
from src_snippets.readers import BadInput
from src_snippets.stains import as_seen
from src_snippets.transforms import collate, training_target, TrainingSet


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
def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        drop_last=len(samples) >= config.batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=gpu,
    )


# %%
def check_finite(values: dict[str, float], step: int, targets: list[dict]) -> None:
    """Raises FloatingPointError where a loss is not finite; names the parts and the images."""
    if not all(map(math.isfinite, values.values())):
        names = [target["name"] for target in targets]
        raise FloatingPointError(
            f"Step {step}: losses {values} on images {', '.join(names)}. Training has stopped; the "
            "checkpoints are of earlier epochs. Lower lr, or set precision='no'."
        )


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
    model, loader, optimizer, schedule, accelerator, config: Config, bar, after_step=None
) -> dict:
    """Trains for one pass over the loader, or until `after_step` says that it is enough.

    Args:
        model, optimizer, schedule: `schedule` is stepped once a batch.
        bar: a tqdm bar that counts batches.
        after_step: called after each update of the weights; True ends the pass.

    Returns:
        The mean of each loss part, and their sum as `loss`.

    Raises:
        FloatingPointError: see `check_finite`.
    """
    means = {}
    model.train()
    for images, targets in loader:
        with accelerator.accumulate(model):
            losses = model(images, targets)
            accelerator.backward(sum(losses.values()))
            # Read only now: a GPU has the backward pass to do while the numbers are fetched.
            values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
            check_finite(values, bar.n, targets)
            if config.clip_norm and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)  # unscales first
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            enough = bool(after_step and accelerator.sync_gradients and after_step())
        for name, value in (values | {"loss": sum(values.values())}).items():
            means.setdefault(name, MeanMetric()).update(value, len(images))
        parts = {name.removeprefix("loss_"): f"{value:.2f}" for name, value in values.items()}
        bar.set_postfix(parts | {"rate": f"{max(schedule.get_last_lr()):.1e}"}, refresh=False)
        bar.update()
        if enough:
            break
    return {name: float(mean.to(accelerator.device).compute()) for name, mean in means.items()}


# %%
def validate(model, samples: Sequence[CellSample], config: Config) -> list[Instances]:
    """Detections on whole, unaugmented fields, one `Instances` a sample, in their order."""
    return [detect(model, [as_seen(s.image, config)], config)[0] for s in samples]


@torch.no_grad()
def validation_loss(model: nn.Module, samples: Sequence[CellSample], config: Config) -> float:
    """Mean loss on whole, unaugmented fields; norms as in prediction, equal sampling."""
    device = next(model.parameters()).device
    precision, losses = choose_precision(config, device), []
    model.eval()
    for part in (model, model.rpn, model.roi_heads):
        part.training = True  # these give losses; the layers within them stay as they are
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        for sample in samples:
            target = training_target(sample, config.min_area)
            target = {key: value.to(device) for key, value in target.items()}
            with torch.autocast(device.type, dtype, enabled=precision != "no"):
                parts = model([as_seen(sample.image, config).to(device)], [target])
            losses.append(float(sum(parts.values())))
    model.eval()
    return sum(losses) / len(losses)


def by_image_id(answers: Sequence[Instances]) -> dict[int, Instances]:
    """Answers keyed 1, 2, .. as `coco_truth` numbers images."""
    return dict(enumerate(answers, start=1))


# %% [markdown]
# A run has a folder of its own, named after its recipe and a fingerprint of settings and images:
# changed settings never overwrite an earlier run, and the same ones continue it. The fingerprint is
# free of the settings below; what `overlaps` does to the truth shows in the images'.

# %%
NOT_TRAINED = (
    "cache_gb",
    "workers",
    "score_floor",
    "mask_threshold",
    "box_nms",
    "class_nms",
    "mask_nms",
    "fusion_iou",
    "least_area",
    "rescore",
    "tile",
    "tile_batch",
    "test_views",
    "test_scales",
    "vote",
    "overlaps",
    "fold",
    "detections",
    "show_floor",
    "tune",
)


def run_folder(out: Path, config: Config, data: dict) -> Path:
    """The folder of a run: `out/runs/<recipe>-<fingerprint>`, made if absent.

    Args:
        data: anything JSON that tells the images apart, such as the split.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINED}
    text = json.dumps([settings, data], sort_keys=True)
    name = f"{config.recipe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    folder = out / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# %%
def save_checkpoint(content: dict, path: Path) -> None:
    """Writes a checkpoint, whole or not at all."""
    with written_whole(path) as partial:
        torch.save(content, partial)


# %%
def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint without running any code from it.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: is not there. Run the training cell to its end, or correct the path."
        ) from error
    except Exception as error:  # the unpickler raises many types; each means a bad file
        raise BadInput(f"{path}: not a checkpoint ({error}). Remove it to train anew.") from error
    if not isinstance(state, dict) or not {"model", "config"} <= set(state):
        raise BadInput(f"{path}: not a checkpoint of this notebook, such as its best.pt.")
    return state


def check_same_settings(saved: dict, config: Config, path: Path) -> None:
    """Raises ValueError where a checkpoint was made with other settings that shape training."""
    now = asdict(config)
    if differ := [k for k in now if k not in NOT_TRAINED and saved.get(k) != now[k]]:
        shown = ", ".join(f"{k}={saved.get(k)!r} (now {now[k]!r})" for k in differ)
        raise ValueError(
            f"{path}: made with other settings: {shown}. Run the cells from the settings on, so "
            "that they get a run of their own."
        )


# %%
def load_trained(path: Path, config: Config, same: bool = True) -> tuple[nn.Module, Config]:
    """Builds the model of a checkpoint with its weights, on the GPU if there is one.

    Args:
        path: a `best.pt`.
        config: its settings for prediction are used.
        same: refuse a checkpoint whose other settings differ; else it may be of any recipe.

    Returns:
        The model, and the settings it was made with, but for those of prediction.

    Raises:
        FileNotFoundError, BadInput, ValueError: no checkpoint, a broken one, other settings.
    """
    state = load_checkpoint(path)
    if same:
        check_same_settings(state["config"], config, path)
    known = {item.name for item in fields(Config)}
    saved = {name: value for name, value in state["config"].items() if name in known}
    own = replace(Config(**saved), **{name: getattr(config, name) for name in NOT_TRAINED})
    if own.num_classes != config.num_classes:
        raise ValueError(
            f"{path}: {own.num_classes} classes; the dataset has {config.num_classes}."
        )
    model = build_model(own, load_initial=False)
    load_model_state(model, state["model"])
    return model.to(default_device()).eval(), own


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
    run.clock.is_over = state["is_over"]


# %%
class TrainingClock:
    """What is spent of `train_hours`; 0 sets no limit.

    Attributes:
        is_over: whether the limit was reached, as seen at the last step.
    """

    def __init__(self, hours: float):
        self.limit, self.is_over = 3600 * hours or math.inf, False
        self.start_epoch(0.0)

    def start_epoch(self, earlier: float) -> None:
        """Begins an epoch; `earlier` seconds went to those before it."""
        self.earlier, self.begun = earlier, time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the epoch began."""
        return time.perf_counter() - self.begun

    def fitting_steps(self, step: int) -> float:
        """How many steps fit into the limit, as fast as `step` of them went so far."""
        share = (self.earlier + self.seconds()) / self.limit
        self.is_over = share >= 1
        return max(step / share, step) if share else math.inf


# %%
class TrainingRun:
    """All that a checkpoint holds: model, optimiser, schedule, scaler, history and best score.

    Args:
        config: settings.
        folder: the run's folder, made if absent; where it holds `last.pt`, that is taken up.
        loader: the training loader, as `training_loader` makes it.
    """

    def __init__(self, config: Config, folder: Path, loader: DataLoader):
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.history = []
        self.clock = TrainingClock(config.train_hours)
        self.accelerator = build_accelerator(config)
        last = folder / "last.pt"
        model = build_model(config, load_initial=not last.exists()).to(self.accelerator.device)
        optimizer = build_optimizer(model, config)
        self.most_steps = config.epochs * math.ceil(len(loader) / config.accumulate)
        self.total = self.most_steps  # the schedule's end: see `after_step`
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: scheduled(step, config, self.total, self.history)
        )
        self.parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        if config.ema:
            self.parts["average"] = WeightMean(model, config.ema)
        if last.exists():
            state = load_checkpoint(last)
            check_same_settings(state["config"], config, last)
            restore_run(self, state)
        prepared = self.accelerator.prepare(model, optimizer, schedule, loader)
        self.model, self.optimizer, self.schedule, self.loader = prepared

    def after_step(self) -> bool:
        """Takes updated weights into their running mean; aims the schedule at the steps that fit.

        Returns:
            Whether the time is spent.
        """
        step = self.parts["schedule"].last_epoch
        if "average" in self.parts:
            self.parts["average"].follow(self.parts["model"], step)
        self.total = math.ceil(min(self.most_steps, self.clock.fitting_steps(step)))
        return self.clock.is_over

    def answering(self) -> nn.Module:
        """The model that is measured and kept: the running mean where there is one."""
        return self.parts["average"].module if "average" in self.parts else self.parts["model"]


# %%
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
    notes = dict(config=asdict(run.config), history=run.history, best=best)
    write_history(run.history, run.folder / "history.csv")
    if is_best:
        kept = {"model": run.answering().state_dict()}
        if "average" in run.parts:
            kept["raw"] = state["model"]
        save_checkpoint({**kept, **notes}, run.folder / "best.pt")
    whole = dict(scaler=scaler, is_over=run.clock.is_over)
    save_checkpoint({**state, **notes, **whole}, run.folder / "last.pt")


# %%
def run_epoch(run: TrainingRun, epoch: int, val_samples, truth: dict, bar) -> None:
    """Trains one epoch, validates when it is due, writes the checkpoints."""
    config = run.config
    run.clock.start_epoch(sum(row["seconds"] for row in run.history))
    torch.manual_seed(config.seed + 1_000_003 * epoch)  # augmentation and sampling of this epoch
    run.loader.set_epoch(epoch)  # order of the images
    parts = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    losses = train_epoch(*parts, config, bar, run.after_step)
    row = dict(epoch=epoch, seconds=0.0, rate=max(run.schedule.get_last_lr()), **losses)
    last = epoch == config.epochs or run.clock.is_over
    if len(val_samples) and (epoch % config.eval_every == 0 or last):
        model = run.answering()
        scores = average_precision(truth, by_image_id(validate(model, val_samples, config)))
        row |= {name: scores[name] for name in ("AP", "AP50", "AP75")}
        ap = "no cells to score" if row["AP50"] is None else f"AP50 {row['AP50']:.3f}"
        if config.best_by == "loss" or config.schedule == "plateau":
            row["val_loss"] = validation_loss(model, val_samples, config)
            ap += f", loss {row['val_loss']:.3f}"
        bar.write(f"epoch {epoch}: loss {row['loss']:.3f}, validation {ap}")
    row["seconds"] = round(run.clock.seconds(), 2)
    save_epoch(run, row)
    free_memory()  # crops differ in size; what the cache of a GPU holds may not fit the next


def free_memory() -> None:
    """Gives back what is no longer used, of the GPU's cache too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# %%
def fit(config: Config, train_samples, val_samples, folder: Path) -> list[dict]:
    """Trains a model, or goes on with the run that lies in `folder`.

    Args:
        train_samples, val_samples: sequences of `CellSample`; without validation samples `best.pt`
            is the last epoch's.
        folder: gets `best.pt`, `last.pt` and `history.csv`.

    Returns:
        One dictionary an epoch: epoch, seconds, rate, mean losses, and in epochs with a validation
        AP, AP50, AP75 (0..1, uncapped), and val_loss where a setting needs it.
    """
    run = TrainingRun(config, folder, training_loader(train_samples, config, default_device()))
    done = len(run.history)
    if done:
        print(f"{folder}: {done} of {config.epochs} epochs are done, going on from there.")
    truth = coco_truth(val_samples, config.num_classes)
    steps = len(run.loader)
    options = dict(total=config.epochs * steps, initial=done * steps, unit="batch")
    with tqdm(desc="training", **options) as bar:
        for epoch in range(done + 1, config.epochs + 1):
            if has_stalled(run.history, config):
                bar.write(f"No better {config.best_by} in {config.patience} looks: training ends.")
                break
            if run.clock.is_over:
                bar.write(f"train_hours={config.train_hours:g} are spent: training ends.")
                break
            run_epoch(run, epoch, val_samples, truth, bar)
    history = run.history
    del run  # the schedule refers to it: only a collection frees its model and optimiser
    free_memory()
    return history
