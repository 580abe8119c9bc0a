"""Settings: one frozen dataclass, and recipes that state only what they change."""

# %%
# @title Config: every setting with its default, range and meaning
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
import json

import pandas as pd


class BadInput(ValueError):
    """A file, folder or setting is not what it should be; the message says which and what to do."""


def require(condition, message: str) -> None:
    """Raise BadInput where a condition does not hold."""
    if not condition:
        raise BadInput(message)


def within(default, low, high):
    """A dataclass field with a default and the inclusive range of its value (of each element)."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default, *others):
    """A dataclass field that takes `default` or one of `others`."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Config:
    """All settings. Lengths are image pixels unless a line says network pixels (after `scale`)."""

    recipe: str = "baseline"  # set by make_config; a recipe has other values than these defaults
    seed: int = within(0, 0, 2**31 - 1)  # split, initial weights, order, augmentation
    # Data
    class_names: tuple[str, ...] = ("class1", "class2", "class3", "class4")  # in this order
    um_per_px: float = within(0.0, 0.0, 1000.0)  # micrometres per pixel; 0: as the TIFF says
    channels: tuple[int, ...] = within((), 1, 64)  # for red, green, blue, from 1 on; one: grey
    val_fraction: float = within(0.2, 0.0, 0.9)  # fraction of the images for validation
    folds: int = within(1, 1, 100)  # k: cross-validation with k models; 1: one split
    fold: int = within(0, 0, 100)  # train this fold only, from 1 on; 0: all of them
    split_by: str = one_of("appearance", "image")  # appearance: similar images stay on one side
    cache_gb: float = within(4.0, 0.0, 1024.0)  # GB of decoded images kept in memory
    workers: int = within(-1, -1, 64)  # loader processes; -1: up to 4 with a GPU, else none
    grey: bool = False  # the model sees brightness only
    # Augmentation of the training part
    crop: int = within(512, 32, 8192)  # px, side of a training crop; smaller: less GPU memory
    scale_jitter: tuple[float, float] = within((0.8, 1.25), 0.1, 10.0)  # random scale, from, to
    flips: bool = True  # random flips and quarter turns
    color_jitter: float = within(0.2, 0.0, 1.0)  # strength; stains differ between laboratories
    class_crops: float = within(0.0, 0.0, 1.0)  # fraction of crops around a cell of a random class
    copy_paste: float = within(0.0, 0.0, 1.0)  # fraction of crops with cells of another image
    # Model
    backbone: str = "resnet50"  # resnet10, resnet50_v1, timm:NAME (strides 4 to 32)
    weights: str = "imagenet"  # imagenet, coco (data beyond ImageNet), none, or a file
    drop_path: float = within(0.0, 0.0, 0.9)  # stochastic depth of the backbone
    norm: str = one_of("batch", "frozen")  # batch norm of the backbone; frozen: as in its weights
    attention: str = one_of("none", "se", "cbam")  # after each stage; identity at the start
    fpn_channels: int = within(256, 8, 1024)  # width of FPN and heads; coco weights need 256
    head_norm: str = one_of("batch", "none")  # in FPN and heads; none: older detectron2 weights
    scale: float = within(1.0, 0.25, 8.0)  # network px per image px; 2: 4 times the compute
    rpn_convs: int = within(2, 1, 8)  # 3x3 convolutions of the RPN head
    box_convs: int = within(4, 0, 8)  # convolutions of the box head
    box_layers: int = within(1, 1, 4)  # fully connected layers of the box head
    box_features: int = within(1024, 16, 4096)  # width of these layers
    mask_convs: int = within(4, 1, 8)  # convolutions of the mask head
    anchor_sizes: tuple[int, ...] = within((8, 16, 32, 64, 128), 2, 2048)  # network px, per level
    anchor_ratios: tuple[float, ...] = within((0.5, 1.0, 2.0), 0.05, 20.0)  # height / width
    proposals: int = within(2000, 1, 20_000)  # maximum after NMS; before it, per FPN level
    roi_batch_size: int = within(512, 8, 4096)  # proposals per image that the heads learn from
    # Training
    epochs: int = within(50, 1, 10_000)  # maximum passes over the training part
    train_hours: float = within(0.0, 0.0, 1000.0)  # h; the schedule ends then; 0: with epochs
    max_hours: float = within(-1.0, -1.0, 1000.0)  # h of the session; 0: no end; -1: 8.8 on Kaggle
    gpus: int = within(0, 0, 64)  # GPUs to use, one process each; 0: all
    batch_size: int = within(2, 1, 256)  # crops per step and GPU
    accumulate: int = within(1, 1, 256)  # batches per optimiser step
    optimizer: str = one_of("adamw", "adam", "sgd")  # sgd: momentum 0.9, needs 50 times the lr
    lr: float = within(1e-4, 1e-7, 1.0)  # peak learning rate
    scale_lr: bool = True  # lr times the square root of the number of GPUs
    lr_factors: tuple[float, ...] = within((1.0,) * 4, 0.0, 10.0)  # stem, backbone, FPN, heads
    layer_decay: float = within(1.0, 0.1, 1.0)  # lr factor per backbone stage, from the top down
    weight_decay: float = within(0.01, 0.0, 1.0)  # not for norms and biases
    warmup_steps: int = within(500, 0, 100_000)  # linear warm-up; at most a fifth of all steps
    schedule: str = one_of("constant", "cosine", "plateau")  # plateau: lr / 10 after 3 without gain
    clip_norm: float = within(1.0, 0.0, 1000.0)  # maximum gradient norm; 0: no clipping
    ema: float = within(0.0, 0.0, 0.99999)  # decay of the EMA of the weights; 0: off
    precision: str = one_of("auto", "no", "fp16", "bf16")  # auto: bf16, else fp16; no on a CPU
    eval_every: int = within(1, 1, 10_000)  # epochs between evaluations
    best_by: str = one_of("AP50", "AP", "loss", "last")  # what chooses the epoch of best.pt
    patience: int = within(0, 0, 10_000)  # evaluations without improvement to stop after; 0: never
    # Prediction
    score_threshold: float = within(0.05, 0.0, 1.0)  # minimum score in test-results.json
    mask_threshold: float = within(0.5, 0.0, 1.0)  # minimum probability of a mask pixel
    box_nms: float = within(0.5, 0.0, 1.0)  # IoU threshold of NMS on boxes of a tile, by class
    overlaps: bool = True  # False: one instance per pixel, in the ground truth too
    detections: int = within(300, 1, 20_000)  # maximum per image, and per tile
    tile: int = within(0, 0, 8192)  # px, side of tiles with half overlap; 0: whole images
    tta: str = one_of("none", "flips", "d4")  # test-time augmentation: 1, 3 or 8 views
    fusion_iou: float = within(0.4, 0.0, 1.0)  # box IoU at which tiles, views, models are fused
    export_score_threshold: float = within(0.5, 0.0, 1.0)  # minimum score: figures, exports, csv

    @property
    def num_classes(self) -> int:
        """C, the number of classes without background."""
        return len(self.class_names)


# %%
# @title RECIPES, and make_config: checked settings
# fmt: off
BEST = dict(  # parts of public solutions for HW3's images (untested here)
    backbone="timm:resnet101.tv2_in1k", crop=576, scale=1.333, scale_jitter=(0.5, 2.0),
    anchor_sizes=(12, 24, 48, 96, 192), class_crops=0.5, copy_paste=0.5, epochs=10_000,
    train_hours=7.0, schedule="cosine", ema=0.999, eval_every=50, best_by="last",
    score_threshold=0.01, detections=1500, tile=768, tta="d4", export_score_threshold=0.3,
)
RECIPES = {
    "baseline": dict(  # torchvision's maskrcnn_resnet50_fpn_v2 with small anchors
        scale=2.0, box_nms=0.3, detections=200, score_threshold=0.5, mask_threshold=0.6,
    ),
    "attention": dict(  # CBAM after each stage; 250 steps: three epochs of HW3's 167 images
        scale=2.0, attention="cbam", warmup_steps=250, schedule="cosine", best_by="AP",
        patience=30, box_nms=0.3,
    ),
    "small_anchors": dict(  # grey input and small, flat anchors
        grey=True, anchor_sizes=(4, 8, 16, 32, 48), anchor_ratios=(0.25, 0.5, 1.0), mask_convs=6,
        box_convs=6, optimizer="sgd", lr=5e-3, batch_size=4, schedule="cosine", patience=10,
    ),
    "convnext": dict(  # ConvNeXt-Tiny on the whole 520 x 704 px images of Sartorius (CSV data)
        crop=704, scale_jitter=(1.0, 1.0), backbone="timm:convnext_tiny.fb_in1k", epochs=20,
        batch_size=1, weight_decay=5e-4, schedule="plateau", best_by="loss", overlaps=False,
    ),
    "lsj_ensemble": dict(  # large-scale jitter, learning rates by part, ensemble of five folds
        folds=5, crop=1024, scale_jitter=(0.1, 2.0), optimizer="adam", schedule="cosine",
        lr_factors=(0.1, 0.3, 1.0, 1.0), weight_decay=0.0,
    ),
    "best": BEST | dict(batch_size=4, norm="frozen"),  # a T4, one session of 9 hours
    "best_large": BEST | dict(  # a larger GPU, or several sessions
        backbone="timm:convnextv2_base.fcmae_ft_in1k", train_hours=20.0, accumulate=2,
        drop_path=0.2, weight_decay=0.05, layer_decay=0.5,  # of the stem 0.06, as ConvNeXt-B's
    ),
    "light": BEST | dict(  # a laptop or a session without a GPU: a small backbone
        crop=256, scale_jitter=(0.8, 1.25), backbone="timm:tf_efficientnet_lite0.in1k", scale=1.5,
        fpn_channels=96, rpn_convs=1, box_convs=0, box_features=512, proposals=1000,
        roi_batch_size=128, train_hours=2.0, batch_size=4, lr=1e-3, weight_decay=0.05,
        lr_factors=(0.3, 0.3, 1.0, 1.0), warmup_steps=100, ema=0.998, tile=512,
    ),
    "demo": dict(  # the synthetic dataset on a CPU
        crop=128, backbone="resnet10", weights="none", fpn_channels=64, rpn_convs=1, box_convs=0,
        box_features=256, mask_convs=2, proposals=300, roi_batch_size=64, epochs=18, batch_size=4,
        lr=2e-3, warmup_steps=50, schedule="cosine", eval_every=6, detections=200,
    ),
}
RENAMED = dict(  # names of earlier versions, refused with the present one
    zoom="scale_jitter", quarter_turns="flips", rare_crops="class_crops", rois="roi_batch_size",
    group_lr="lr_factors", score_floor="score_threshold", show_floor="export_score_threshold",
    test_views="tta", num_classes="class_names",
)
# fmt: on
MAX_LENGTHS = dict(class_names=255, anchor_ratios=32, channels=3)  # other tuples: as default


def check_setting(item, value):
    """A field's value, of JSON too (lists, whole numbers); ValueError says what is valid."""
    default, limits = item.default, item.metadata
    is_tuple, cap = isinstance(default, tuple), MAX_LENGTHS.get(item.name, 0)
    kind = item.type.__args__[0] if is_tuple else item.type
    values = value if is_tuple and isinstance(value, (list, tuple)) else (value,)
    values = tuple(float(v) if kind is float and type(v) is int else v for v in values)
    has_length = len(values) == (len(default) if is_tuple else 1) or 0 < len(values) <= cap
    valid = has_length and all(type(v) is kind for v in values)
    expected = f"{kind.__name__} as in the default {default!r}{f', {cap} at most' if cap else ''}"
    if "choices" in limits:
        expected = f"one of {', '.join(limits['choices'])}"
        valid = value in limits["choices"]
    elif limits:
        expected += f", from {limits['low']} to {limits['high']}"
        valid = valid and all(limits["low"] <= v <= limits["high"] for v in values)
    require(valid, f"Setting {item.name}={value!r}: expected {expected}.")
    return values if is_tuple else values[0]


def change_config(config: Config, changes: Mapping) -> Config:
    """A copy with some fields changed, all of them checked; ValueError says what is not valid."""
    known = {item.name: item for item in fields(Config) if item.name != "recipe"}
    for name in sorted(set(changes) - set(known)):
        require(name not in RENAMED, f"Setting {name} is called {RENAMED.get(name)} now.")
        hint = "".join(f" Did you mean {close}?" for close in get_close_matches(name, known, 1))
        raise ValueError(f"There is no setting {name}.{hint} There are: {', '.join(known)}.")
    config = replace(config, **{k: check_setting(known[k], v) for k, v in changes.items()})
    names, folds, (low, high) = config.class_names, config.folds, config.scale_jitter
    valid = "" not in names and len(set(names)) == len(names)
    require(valid, f"Setting class_names={names}: expected one name per class, each once.")
    require(low <= high, f"Setting scale_jitter={(low, high)}: expected from <= to.")
    last = folds if folds > 1 else 0
    require(config.fold <= last, f"Setting fold={config.fold}: expected at most {last}, {folds=}.")
    return config


def make_config(recipe: str, /, **changes) -> Config:
    """The settings of a recipe with some fields changed; raises ValueError as `change_config`."""
    require(recipe in RECIPES, f"There is no recipe {recipe!r}; there are: {', '.join(RECIPES)}.")
    return change_config(Config(recipe=recipe), {**RECIPES[recipe], **changes})


def with_class_names(config: Config, names: Sequence[str]) -> Config:
    """The settings with a dataset's class names, or the user's; ValueError for other ones."""
    if config.class_names == Config.class_names:
        return replace(config, class_names=tuple(names))
    expected = f"{len(names)} names, for the dataset's classes {', '.join(names)} in this order"
    moved = [a for a, b in zip(config.class_names, names, strict=False) if a != b and a in names]
    fits = len(config.class_names) == len(names) and not moved
    require(fits, f"Setting class_names={config.class_names}: expected {expected}.")
    return config


def config_table(config: Config) -> pd.DataFrame:
    """The settings that differ from recipe or default, with the values of both."""
    columns = {"value": config, "recipe": make_config(config.recipe), "default": Config()}
    table = pd.DataFrame({name: vars(settings) for name, settings in columns.items()}, dtype=object)
    return table[(table["value"] != table["recipe"]) | (table["value"] != table["default"])]


def read_settings(changes: Mapping, environ: Mapping[str, str]) -> dict:
    """Changes to settings, and over them the JSON object in `HW3_SETTINGS`, if it is set."""
    text = environ.get("HW3_SETTINGS") or "{}"
    try:
        return {**changes, **json.loads(text)}
    except (ValueError, TypeError) as error:
        expected = 'expected a JSON object such as {"epochs": 3}'
        raise ValueError(f"HW3_SETTINGS={text!r}: {expected} ({error}).") from error
