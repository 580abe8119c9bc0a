"""Settings: one frozen dataclass, and recipes that state only what they change."""

# %% [markdown]
# ## What can be set?
# Every knob of the notebook is a field of `Config`. A recipe is a name for a set of changes to the
# defaults. `recipe("baseline", epochs=30)` checks names and ranges and says what is valid.

# %%
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import pairwise
import json
import os


# %%
def within(default, low, high):
    """A dataclass field with a default and the inclusive range of its value (of each element)."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default, *others):
    """A dataclass field that takes `default` or one of `others`."""
    return field(default=default, metadata={"choices": (default, *others)})


# %%
# Trunks of torchvision. resnet10 is small enough for a CPU and has no published weights;
# resnet50_v2 is resnet50 with the weights of torchvision's newer training, resnet50_v1 has its
# strides where the first paper and most checkpoints of detectron2 have them.
TRUNKS = (
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50_v1",
    "resnet50_v2",
    "resnet101",
    "resnext50_32x4d",
    "mobilenet_v2",
    "efficientnet_b0",
    "efficientnet_b1",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
)


# %%
@dataclass(frozen=True)
class DataSettings:
    """Data and augmentation. Lengths are in image pixels unless a line says network pixels.

    `within(default, low, high)` states the range of a value, `one_of` its choices.
    """

    recipe: str = "baseline"  # the recipe these settings started from; set by recipe()
    seed: int = within(0, 0, 2**31 - 1)  # split, initial weights, order, augmentation
    # Data
    num_classes: int = within(4, 1, 255)  # K of the last classK.tif; CSV and COCO files tell it
    class_names: tuple[str, ...] = ("",)  # of classes 1..K, and so K; empty: as the data say
    um_per_px: float = within(0.0, 0.0, 1000.0)  # micrometres a pixel, for tables; 0: unknown
    val_fraction: float = within(0.2, 0.0, 0.9)  # share of the images that measures, never trains
    folds: int = within(1, 1, 100)  # k: k models, each measured on another k-th; 1: val_fraction
    split_by: str = one_of("look", "image")  # look: fields that look alike stay on one side
    fold: int = within(0, 0, 100)  # the only one to train now, from 1 on; 0: all, one by one
    cache_gb: float = within(4.0, 0.0, 1024.0)  # GB of decoded fields kept in memory
    workers: int = within(-1, -1, 64)  # loader processes; -1: one a core, at most 4; 0 without GPU
    grey: bool = False  # the model sees brightness alone; for stains that colours mislead
    pixel_mean: tuple[float, ...] = within((0.485, 0.456, 0.406), 0.0, 1.0)  # R, G, B; of ImageNet
    pixel_std: tuple[float, ...] = within((0.229, 0.224, 0.225), 0.001, 1.0)  # see the notebook
    stain_norm: bool = False  # H&E of each field is brought to one look, in training and after
    # Augmentation of the training part
    crop: int = within(512, 32, 8192)  # px, side of a training crop; smaller: less GPU memory
    zoom: tuple[float, float] = within((0.8, 1.25), 0.1, 10.0)  # least and most magnification
    fill: bool = True  # small fields get pieces of others beside them; False: padded
    flips: bool = True  # left-right and up-down, each for half of the crops
    quarter_turns: bool = True  # 0, 90, 180 or 270 degrees
    color_jitter: float = within(0.2, 0.0, 1.0)  # strength; stains differ between laboratories
    stain_jitter: float = within(0.0, 0.0, 1.0)  # strength; hematoxylin and eosin, each by itself
    blur: float = within(0.1, 0.0, 1.0)  # share of crops blurred, as if out of focus
    cell_crops: float = within(0.0, 0.0, 1.0)  # share of crops laid around a random cell
    rare_crops: float = within(0.0, 0.0, 1.0)  # share laid around one of a class, each as likely
    copy_paste: float = within(0.0, 0.0, 1.0)  # share of crops that get cells of another field
    min_area: int = within(4, 1, 10_000)  # px; slivers left by a crop that are smaller are dropped


# %%
@dataclass(frozen=True)
class ModelSettings(DataSettings):
    """Trunk and pyramid.

    With `short_sides` a whole field gets a shorter side of so many network px, and a longer one of
    at most twice as many; training draws one of them for each crop, whose `crop` then is in network
    px, and prediction takes the last.
    """

    backbone: str = "resnet50"  # one of TRUNKS above, or timm:<a name of timm>
    weights: str = "imagenet"  # imagenet, coco, none, or a file. coco is data beyond ImageNet
    trained_stages: int = within(5, 0, 5)  # of stem and four stages, from the top; others frozen
    norm: str = one_of("batch", "frozen", "group", "sync")  # frozen: the trunk's; for tiny batches
    attention: str = one_of("none", "se", "cbam")  # behind each stage; the identity at the start
    fine_stem: bool = False  # stem of half the stride: pyramid from 2 to 32; 4x cost
    pyramid: tuple[int, ...] = within((4, 8, 16, 32, 64), 2, 64)  # strides; 2 for tiny cells
    fpn_channels: int = within(256, 8, 1024)  # width of pyramid and heads; 256 fits coco weights
    scale: float = within(1.0, 0.25, 8.0)  # network px per image px; 2: smaller cells, 4x cost
    short_sides: tuple[int, ...] = within((0,), 0, 8192)  # in place of scale: network px; 0: off
    half_pixel: bool = True  # masks sampled at pixel centres; False: as stock torchvision


# %%
@dataclass(frozen=True)
class HeadSettings(ModelSettings):
    """Proposals, anchors and heads."""

    head_norm: str = one_of("batch", "none")  # of pyramid and heads; none: as older checkpoints
    rpn_convs: int = within(2, 1, 8)  # 3x3 convolutions before the proposals
    box_convs: int = within(4, 0, 8)  # convolutions in the box head
    box_features: int = within(1024, 16, 4096)  # width of the box head's last layer
    box_layers: int = within(1, 1, 4)  # fully connected layers behind them
    mask_convs: int = within(4, 1, 8)  # convolutions in the mask head
    shared_masks: bool = False  # one mask for all classes in place of one a class
    cascade: bool = False  # three box heads in a row, each from the boxes of the one before
    anchor_sizes: tuple[int, ...] = within((8, 16, 32, 64, 128), 1, 2048)  # network px, one a level
    anchor_ratios: tuple[float, ...] = within((0.5, 1.0, 2.0), 0.05, 20.0)  # height over width
    rpn_nms: float = within(0.7, 0.0, 1.0)  # IoU above which the weaker proposal goes
    rpn_iou: tuple[float, ...] = within((0.3, 0.7), 0.0, 1.0)  # background below, cell from
    rpn_samples: int = within(256, 8, 8192)  # anchors an image that proposals learn from
    proposals: int = within(2000, 1, 20_000)  # kept an image; more for fields with many cells
    rois: int = within(512, 8, 4096)  # proposals an image the heads learn from
    roi_cells: float = within(0.25, 0.01, 1.0)  # largest share of cells among them
    roi_iou: float = within(0.5, 0.05, 0.95)  # IoU with a cell from which a proposal is one


# %%
@dataclass(frozen=True)
class Config(HeadSettings):
    """All settings: those above, training and prediction."""

    epochs: int = within(50, 1, 10_000)  # passes over the training part, at most
    max_hours: float = within(-1.0, -1.0, 1000.0)  # h of the session; 0: no end; -1: 8.8 on Kaggle
    train_hours: float = within(0.0, 0.0, 1000.0)  # the schedule ends with them; 0: with epochs
    gpus: int = within(0, 0, 64)  # used at once, in a process each; 0: all of this machine
    batch_size: int = within(2, 1, 256)  # crops a step and GPU; lower when memory runs out
    accumulate: int = within(1, 1, 256)  # batches whose gradients are added up for one step
    optimizer: str = one_of("adamw", "adam", "sgd")  # sgd, momentum 0.9, wants 50 times the lr
    lr: float = within(1e-4, 1e-7, 1.0)  # the highest rate
    group_lr: tuple[float, ...] = within((1.0, 1.0, 1.0, 1.0), 0.0, 10.0)  # stem, trunk, neck, head
    layer_decay: float = within(1.0, 0.1, 1.0)  # of the rate, from each stage of the trunk down
    weight_decay: float = within(0.01, 0.0, 1.0)  # of weights; norms and biases are not decayed
    warmup_steps: int = within(500, 0, 100_000)  # steps of rising rate; at most a fifth of all
    warmup: str = one_of("linear", "cosine")  # how the rate rises
    schedule: str = one_of("constant", "cosine", "one_cycle", "plateau")  # after the warm-up
    plateau_patience: int = within(3, 1, 1000)  # looks without a lower loss, then lr / 10
    clip_norm: float = within(1.0, 0.0, 1000.0)  # largest gradient norm; 0: no clipping
    ema: float = within(0.0, 0.0, 0.99999)  # running mean of the weights answers; 0: off, try 0.999
    precision: str = one_of("auto", "no", "fp16", "bf16")  # auto: bf16, else fp16; no on a CPU
    eval_every: int = within(1, 1, 10_000)  # epochs between two looks at the validation part
    best_by: str = one_of("AP50", "AP", "loss")  # of the validation part: which epoch is kept
    patience: int = within(0, 0, 10_000)  # looks without a better one, then it stops; 0: never
    # Prediction
    score_floor: float = within(0.05, 0.0, 1.0)  # least score kept; AP gains from a low one
    # Those marked with * take one value for all classes, or one for each.
    mask_threshold: tuple[float, ...] = within((0.5,), 0.0, 1.0)  # * probability of a cell's pixel
    box_nms: float = within(0.5, 0.0, 1.0)  # IoU above which the weaker detection of a class goes
    class_nms: tuple[float, ...] = within((1.0,), 0.0, 1.0)  # * as box_nms, by mask IoU; 1: off
    mask_nms: float = within(1.0, 0.0, 1.0)  # the same over all classes together; 1: off
    overlaps: bool = True  # False: a pixel is one cell's: the better one's, in truth the first's
    fusion_iou: float = within(0.5, 0.0, 1.0)  # mask IoU above which answers mean the same cell
    least_area: tuple[int, ...] = within((1,), 1, 100_000)  # * px; smaller cells are left out
    detections: int = within(300, 1, 20_000)  # most cells an image, and a tile
    rescore: bool = False  # scores times the mean probability inside the mask
    tile: int = within(0, 0, 8192)  # px, side of tiles that overlap by half; 0: whole images
    tile_batch: int = within(4, 1, 256)  # tiles a batch
    test_views: str = one_of("one", "flips", "all")  # 1, 3 or 8 symmetries of each image
    test_scales: tuple[float, ...] = within((1.0,), 0.1, 10.0)  # magnifications of each view
    vote: bool = True  # masks of several views or models: what most say; False: the best one's
    show_floor: tuple[float, ...] = within((0.5,), 0.0, 1.0)  # * least score that is shown
    tune: bool = False  # what has * is chosen on the validation part, for the test


# %% [markdown]
# `baseline` is the ResNet-50 v2 pipeline that most people start from, with its thresholds; `demo`
# is small enough for two CPU cores.

# %%
DEMO = dict(
    crop=128,
    backbone="resnet10",
    weights="none",
    fpn_channels=64,
    rpn_convs=1,
    box_convs=0,
    box_features=256,
    mask_convs=2,
    proposals=300,
    rois=64,
    epochs=18,
    batch_size=4,
    lr=2e-3,
    warmup_steps=50,
    schedule="cosine",
    eval_every=6,
    detections=200,
)

# %%
SMALL_ANCHORS = dict(
    grey=True,
    anchor_sizes=(4, 8, 16, 32, 48),
    anchor_ratios=(0.25, 0.5, 1.0),
    mask_convs=6,
    box_convs=6,
    optimizer="sgd",
    lr=5e-3,
    batch_size=4,
    schedule="cosine",
    patience=10,
)

CONVNEXT = dict(
    crop=704,
    zoom=(1.0, 1.0),
    fill=False,
    backbone="timm:convnext_tiny.fb_in1k",
    epochs=20,
    batch_size=1,
    weight_decay=5e-4,
    schedule="plateau",
    best_by="loss",
    overlaps=False,
)

LSJ_ENSEMBLE = dict(
    folds=5,
    crop=1024,
    zoom=(0.1, 2.0),
    optimizer="adam",
    group_lr=(0.1, 0.3, 1.0, 1.0),
    weight_decay=0.0,
    schedule="cosine",
)

# %%
# What gained on CoNSeP with the small model (README): crops by class, pasted cells, tiles, flips,
# weak detections; trunk, crop and running mean of the weights as in the best public solutions of
# HW3. Its own score is not measured. It ends by the clock.
BEST = dict(
    backbone="timm:convnext_tiny.fb_in1k",
    crop=768,
    rare_crops=0.5,
    copy_paste=0.5,
    epochs=300,
    train_hours=7.0,
    weight_decay=0.05,
    layer_decay=0.8,
    schedule="cosine",
    ema=0.999,
    eval_every=10,
    score_floor=0.01,
    detections=600,
    tile=512,
    test_views="flips",
)

# %%
RECIPES = {
    # torchvision's maskrcnn_resnet50_fpn_v2 with anchors for cells. Score on HW3: not measured.
    "baseline": dict(
        scale=2.0,
        box_nms=0.3,
        detections=200,
        score_floor=0.5,
        mask_threshold=(0.6,),
    ),
    # Attention behind the stages; 250 steps are three epochs of HW3. Not measured.
    "attention": dict(
        scale=2.0,
        attention="cbam",
        warmup_steps=250,
        schedule="cosine",
        best_by="AP",
        patience=30,
        box_nms=0.3,
    ),
    # Grey input and small, flat anchors. Not measured.
    "small_anchors": SMALL_ANCHORS,
    # ConvNeXt-Tiny on the whole fields of 520 x 704 px of Sartorius. Not measured.
    "convnext": CONVNEXT,
    # Large-scale jitter, a rate for each part, five folds that answer together. Not measured.
    "lsj_ensemble": LSJ_ENSEMBLE,
    # For a T4 in one session of 9 hours.
    "best": BEST,
    # A trunk of 88 million parameters in place of 28: for a larger GPU, or several sessions.
    "best_large": BEST | dict(backbone="timm:convnextv2_base.fcmae_ft_in1k", train_hours=20.0),
    # The drawn dataset on a CPU.
    "demo": DEMO,
}


# %%
BY_CLASS = ("mask_threshold", "class_nms", "least_area", "show_floor")  # one value, or one a class
ANY_NUMBER = (
    "anchor_sizes",
    "anchor_ratios",
    "pyramid",
    "short_sides",
    "test_scales",
    "class_names",
    *BY_CLASS,
)


# %%
def check_setting(config_field, value):
    """Checks one value against its field's type, range or choices.

    Args:
        config_field: a `dataclasses.Field` of `Config`.
        value: the wanted value; JSON lists stand for tuples, whole numbers for floats.

    Returns:
        The value in the field's own type.

    Raises:
        ValueError: names the field, what was found and what is valid.
    """
    name, default, limits = config_field.name, config_field.default, config_field.metadata
    is_tuple = isinstance(default, tuple)
    items = list(value) if is_tuple and isinstance(value, (list, tuple)) else [value]
    kind = type(default[0] if is_tuple else default)
    if kind is float:
        items = [float(v) if type(v) is int else v for v in items]
    wanted = "True or False (in JSON true or false)" if kind is bool else kind.__name__
    fixed = is_tuple and name not in ANY_NUMBER
    if is_tuple:
        wanted = f"{len(default)} values of type {wanted}" if fixed else f"values of type {wanted}"
    if "choices" in limits:
        wanted += " out of " + ", ".join(limits["choices"])
    elif limits:
        wanted += f" from {limits['low']} to {limits['high']}"
    fits = all(type(v) is kind for v in items) and (not fixed or len(items) == len(default))
    if fits and "choices" in limits:
        fits = items[0] in limits["choices"]
    elif fits and limits:
        fits = len(items) > 0 and all(limits["low"] <= v <= limits["high"] for v in items)
    if not fits:
        raise ValueError(
            f"Setting {name}={value!r}: expected {wanted}; the default is {default!r}."
        )
    return tuple(items) if is_tuple else items[0]


# %%
def checked_changes(changes: Mapping) -> dict:
    """Changes to settings in the types of their fields.

    Raises:
        ValueError: unknown field, or a value of wrong type or out of range.
    """
    known = {f.name: f for f in fields(Config) if f.name != "recipe"}
    if unknown := sorted(set(changes) - set(known)):
        close = [near for name in unknown for near in get_close_matches(name, known, 1)]
        meant = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(
            f"There is no setting {', '.join(unknown)}.{meant} There are: {', '.join(known)}."
        )
    return {key: check_setting(known[key], value) for key, value in changes.items()}


# %%
def recipe(name: str, /, **changes) -> Config:
    """The settings of a recipe with some fields changed.

    Args:
        name: a key of `RECIPES`.
        changes: fields of `Config` with their new values.

    Returns:
        A checked `Config`.

    Raises:
        ValueError: unknown recipe, unknown field, or a value of wrong type or out of range.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}; there are: {', '.join(RECIPES)}.")
    config = Config(recipe=name, **checked_changes({**RECIPES[name], **changes}))
    if config.class_names != ("",):
        check_names(config.class_names)
        config = replace(config, num_classes=len(config.class_names))
    for name in ("zoom", "rpn_iou"):
        if (pair := getattr(config, name))[0] > pair[1]:
            raise ValueError(f"Setting {name}={pair}: expected the least before the most.")
    if config.fold > (config.folds if config.folds > 1 else 0):
        raise ValueError(f"Setting fold={config.fold}: expected at most folds, {config.folds}.")
    check_trunk(config)
    return config


# %%
def check_names(names: Sequence[str]) -> None:
    """Raises ValueError unless each class has a name of its own."""
    if not names or "" in names or len(set(names)) < len(names) or len(names) > 255:
        raise ValueError(f"Setting class_names={names}: expected a name a class, each once.")


def check_trunk(config: Config) -> None:
    """Raises ValueError where backbone, pyramid and anchor sizes do not go together."""
    if config.backbone not in TRUNKS and not config.backbone.startswith("timm:"):
        raise ValueError(
            f"Setting backbone={config.backbone!r}: expected timm:<a name of timm> or one of "
            f"{', '.join(TRUNKS)}."
        )
    levels = config.pyramid
    if config.fine_stem and (config.backbone.startswith("timm:") or max(levels) > 32):
        raise ValueError(
            f"Setting fine_stem: expected one of {', '.join(TRUNKS)} and a pyramid from 2, 4 or 8 "
            f"to at most 32, not {config.backbone} and {levels}."
        )
    if any(b != 2 * a for a, b in pairwise(levels)) or not 2 <= levels[0] <= 16 <= levels[-1]:
        raise ValueError(
            f"Setting pyramid={levels}: expected strides that double, such as 4, 8, 16."
        )
    if len(config.anchor_sizes) != len(levels):
        raise ValueError(
            f"Setting anchor_sizes={config.anchor_sizes}: expected one for each of the "
            f"{len(levels)} levels of pyramid={levels}."
        )


# %%
def with_classes(config: Config, names: Sequence[str]) -> Config:
    """The settings for a dataset with classes of these names, unless they name them themselves.

    Raises:
        ValueError: a setting has a value for each of another number of classes.
    """
    count = len(names)
    if config.class_names != ("",) and len(config.class_names) != count:
        raise ValueError(
            f"Setting class_names={config.class_names}: expected {count} names; the data call the "
            f"classes {', '.join(names)}."
        )
    for name in BY_CLASS:
        if len(values := getattr(config, name)) not in (1, count):
            raise ValueError(
                f"Setting {name}={values}: expected one value, or one for each of {count} classes."
            )
    own = tuple(names) if config.class_names == ("",) else config.class_names
    return replace(config, num_classes=count, class_names=own)


# %%
def settings_from(environ: Mapping[str, str], knobs: Mapping | None = None) -> dict:
    """Changes to settings: the knobs that are not None, and over them those in `HW3_SETTINGS`.

    Args:
        environ: its `HW3_SETTINGS` is a JSON object such as `{"epochs": 3}`.

    Raises:
        ValueError: the text is not a JSON object.
    """
    text = environ.get("HW3_SETTINGS") or "{}"
    try:
        changes = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"HW3_SETTINGS is not JSON ({error}): {text!r}; expected such as "
            '{"epochs": 3, "tune": true, "weights": "none"}.'
        ) from None
    if not isinstance(changes, dict):
        raise ValueError(f'HW3_SETTINGS: expected an object such as {{"epochs": 3}}, not {text!r}')
    return {name: value for name, value in (knobs or {}).items() if value is not None} | changes


def checkpoints_from(environ: Mapping[str, str]) -> list[str]:
    """The paths in `HW3_CHECKPOINTS`, separated as in `PATH`."""
    return [path for path in environ.get("HW3_CHECKPOINTS", "").split(os.pathsep) if path]


# %%
PARTS = {
    "data and augmentation": DataSettings,
    "trunk and pyramid": ModelSettings,
    "proposals and heads": HeadSettings,
    "training and prediction": Config,
}


def describe(config: Config) -> str:
    """One line a field, with a mark where the recipe or the user changed it."""
    by_recipe = Config(recipe=config.recipe, **checked_changes(RECIPES[config.recipe]))
    rows = ["* the recipe's own, > other than the recipe's, = told by the data or class_names"]
    told = set()
    for title, part in PARTS.items():
        rows.append(f"{title}:")
        for item in fields(part):
            value = getattr(config, item.name)
            other = "=" if item.name in ("class_names", "num_classes") else ">"
            mark = other if value != getattr(by_recipe, item.name) else "*"
            mark = " " if value == item.default and mark == "*" else mark
            if item.name not in told:
                rows.append(f"  {mark} {item.name:<16} {value}")
        told |= {item.name for item in fields(part)}
    return "\n".join(rows)
