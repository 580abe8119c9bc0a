"""The story: prose and live cells of the notebook; `python -m src_snippets.notebook` runs it too."""

# %% [markdown]
# # Cell instance segmentation with Mask R-CNN
# Run all cells. The notebook finds the dataset, shows it, trains a Mask R-CNN, writes and checks
# `test-results.json`, says how good the model is and what goes wrong, and exports outlines, sizes and
# counts of cells.
#
# - **Kaggle**: File > Import Notebook, add the dataset as input, choose GPU T4 x2, Run All.
# - **Colab**: upload the notebook, choose a GPU runtime, upload the dataset to `/content`, Run all.
# - **No dataset**: a small synthetic one is drawn; all of it runs in a minute or two on a CPU.
#
# Folded cells hold definitions; the open cells below use them. You need not open a folded cell. To
# change how the notebook works, look for "Add your own" in those on augmentation, model and training.

# %% [markdown]
# ## Setup
# Kaggle and Colab bring most packages; only missing ones are installed, and numpy and torch keep
# their versions. A process of its own tests the GPU: some are listed but cannot compute.

# %%
from src_snippets.setup.install import check_gpu, install_missing

# %%
install_missing()
gpu_name = check_gpu()

# %%
import os
from pathlib import Path
import time

import numpy as np
import pandas as pd
import torch

# %%
from src_snippets.setup.config import (
    change_config,
    config_table,
    make_config,
    read_settings,
    require,
    with_class_names,
)

# %% [markdown]
# ### Settings: change them here
# Leave all as it is for a first run. For a score set `RECIPE = "best"` (7 hours, made for a T4, not measured
# yet), then once more with `CHANGES = dict(val_fraction=0)`, on all images. Without a GPU, and to count cells,
# `light`: 2 hours; half an hour gives most of its score. An empty string, 0 or `None` takes the recipe's own
# value. After a change run all cells from here on. Settings of prediction (`tta`, `tile`, `detections`,
# thresholds), of the machine (`MAX_HOURS`, `gpus`, `workers`, `cache_gb`), `class_names` and `um_per_px` keep
# the trained model; others train a new one beside it. Environment variables (`HW3_RECIPE`, ..) override these.
#
# | setting | meaning |
# |---|---|
# | `DATA` | folder with `train/`, or `demo`; empty: search `/kaggle/input`, `/content` and `./data` |
# | `OUT` | folder for results; empty: `/kaggle/working`, else `./results` |
# | `CHECKPOINTS` | paths of `best.pt` files: they predict where `DATA` holds images alone; with `train/` there a new model trains, and all predict the test images |
# | `RECIPE` | empty: `baseline`, without a GPU `light`, without a dataset `demo`; `best`: ResNet-101, 7 hours; `best_large`: ConvNeXtV2-Base, 20 hours; `light`: 2 hours on a CPU; others: folded cell *RECIPES* above |
# | `EPOCHS` | 1 to 10,000 passes over the training images; `best`, `best_large` and `light` go by `TRAIN_HOURS` |
# | `TRAIN_HOURS` | hours of training, such as 3.5: the schedule ends then, or after `EPOCHS` |
# | `MAX_HOURS` | hours from the start of the kernel on, with predicting and writing; on Kaggle 8.8 (for 12-hour sessions 11.8, with `best` also `TRAIN_HOURS = 9.5`; no limit: `CHANGES = dict(max_hours=0)`) |
# | `BATCH_SIZE` | 1 to 256 crops per step and GPU; lower when memory runs out |
# | `CROP` | 32 to 8192 px, side of a training crop; time and memory grow with its square |
# | `BACKBONE` | `resnet50`, or a model of timm and its weights, such as `timm:convnext_tiny.fb_in1k`, with features at strides 4 to 32 (no plain ViT) |
# | `WEIGHTS` | `imagenet`, `coco` (data beyond ImageNet: check the rules), `none`, or the path of a file |
# | `FOLDS` | 5: five models, each trained for `TRAIN_HOURS` and validated on another fifth of the images, predict the test images together |
# | `RESUME` | `False`: train anew although a finished run with the same settings, images and code is there |
# | `CHANGES` | any other setting of the folded cell *Config* above, such as `dict(val_fraction=0)` or `dict(class_names=["tumour", "other"])` |

# %% tags=["parameters"]
DATA = ""  # @param {type:"string"}
OUT = ""  # @param {type:"string"}
CHECKPOINTS = []  # @param {type:"raw"}
RECIPE = ""  # @param ["", "baseline", "attention", "convnext", "small_anchors", "lsj_ensemble", "best", "best_large", "light", "demo"]
EPOCHS = 0  # @param {type:"integer"}
TRAIN_HOURS = 0.0  # @param {type:"number"}
MAX_HOURS = 0.0  # @param {type:"number"}
BATCH_SIZE = 0  # @param {type:"integer"}
CROP = 0  # @param {type:"integer"}
BACKBONE = ""  # @param {type:"string"}
WEIGHTS = ""  # @param {type:"string"}
FOLDS = 0  # @param {type:"integer"}
RESUME = True  # @param {type:"boolean"}
CHANGES = dict()  # @param {type:"raw"}

# %%
from src_snippets.setup.files import (
    atomic_write,
    keep_going,
    load_checkpoint,
    output_folder,
    saved_config,
    show_table,
)

# %%
from src_snippets.setup.devices import launch

# %%
DATA, OUT = os.environ.get("HW3_DATA", DATA), os.environ.get("HW3_OUT", OUT)
RECIPE = os.environ.get("HW3_RECIPE", RECIPE) or ""
CHECKPOINTS = os.environ.get("HW3_CHECKPOINTS", CHECKPOINTS) or []
if isinstance(CHECKPOINTS, (str, os.PathLike)):
    CHECKPOINTS = [path for path in os.fspath(CHECKPOINTS).split(os.pathsep) if path]
CHECKPOINTS = [Path(path).expanduser() for path in CHECKPOINTS]
settings = dict(epochs=EPOCHS, train_hours=TRAIN_HOURS, max_hours=MAX_HOURS, folds=FOLDS)
settings |= dict(batch_size=BATCH_SIZE, crop=CROP, backbone=BACKBONE, weights=WEIGHTS)
changes = read_settings({k: v for k, v in settings.items() if v} | (CHANGES or {}), os.environ)
output, started = output_folder(OUT), time.time()
figures = output / "figures"

# %% [markdown]
# ## Data
# Everything passes through two data structures: `CellSample`, an image with its ground truth, and `Instances`,
# the prediction for one image. The first holds instance maps, the second RLEs (run-length encoding;
# COCO counts down the columns): a thousand cells cost kilobytes, and nothing of shape (instances,
# height, width) is ever made.
# Letters in shapes: `N` instances, `B` images, `C` classes, `L` layers, `H, W` pixels.
# Boxes are XYXY in pixels, right and lower edge outside: a cell in column 3 spans x from 3 to 4.

# %%
from src_snippets.data.rle import encode_runs

# %%
from src_snippets.data.structures import ground_truth, Instances

# %%
from src_snippets.data.synthetic import make_synthetic, SYNTHETIC_NAMES

# %%
from src_snippets.data.images import read_image

# %%
from src_snippets.data.layouts import (
    find_dataset,
    has_ground_truth,
    ImageRecord,
    open_dataset,
)

# %%
data_root = find_dataset(DATA)
is_demo = data_root is None
require(DATA or RECIPE in ("", "demo") or not is_demo, f"{RECIPE=}, but no dataset: set DATA.")
if is_demo:
    data_root = make_synthetic(output / ".synthetic-dataset")
    changes |= {"class_names": SYNTHETIC_NAMES}
    print("DEMO: the images below are synthetic; the scores say nothing about real cells.")
    print("For your own images: set DATA to a folder with train/, run from the settings cell on.")
trains = has_ground_truth(data_root)
require(trains or CHECKPOINTS, f"{data_root}: no masks found; expected in train/, or CHECKPOINTS.")
recipe = RECIPE or ("demo" if is_demo else "baseline" if gpu_name else "light")
config = make_config(recipe, **changes) if trains else saved_config(CHECKPOINTS[0], changes)
print(f"dataset: {data_root}\nresults: {output}\nrecipe: {config.recipe}; changed settings:")
show_table(config_table(config).astype(str))

# %% [markdown]
# ### Read and split the images
# Every file is read once now, so that a bad one shows before training. Images are split, not
# cells: those of one patient or slide (`groups.csv`), or else, from 40 images on, those of similar
# appearance stay on one side, since otherwise the score measures how well a slide is remembered.

# %%
from src_snippets.data.appearance import group_by_appearance

# %%
from src_snippets.data.samples import (
    CellSamples,
    dataset_table,
    dataset_warnings,
    image_stem,
    make_splits,
    subset,
)

# %%
from src_snippets.data.drawing import (
    plot_predictions,
    plot_samples,
    show_figure,
)

# %%
dataset = open_dataset(data_root, config)
config = with_class_names(config, list(dataset.categories.values()))
samples = CellSamples(dataset, config.cache_gb)
splits = make_splits(samples, config) if trains else {}
print(f"{len(dataset.test_images)} test images")
if trains:
    print(dataset_warnings(samples, splits, config))
    show_table(dataset_table(samples, splits, config.class_names))
    train_part = subset(samples, next(iter(splits.values()))["train"])
    shown = [train_part[i] for i in range(0, len(train_part), max(len(train_part) // 4, 1))[:4]]
    items = [(sample.image.numpy(), ground_truth(sample), sample.name) for sample in shown]
    show_figure(plot_samples(items, config.class_names), figures / "samples.png")

# %% [markdown]
# Each cell has an outline in the colour of its class. If outlines do not lie on the cells, images
# and masks do not match.

# %%
from src_snippets.data.transforms import TrainingSet

# %%
if trains:
    torch.manual_seed(config.seed)
    fullest = int(samples.counts.sum(1)[train_part.indices].argmax())
    training_set = TrainingSet(train_part, config)
    variants = [train_part[fullest], *(training_set.augmented(fullest) for _ in range(4))]
    named = zip(variants, ["original", *(f"variant {k}" for k in range(1, 5))], strict=True)
    items = [(sample.image.numpy(), ground_truth(sample), name) for sample, name in named]
    show_figure(plot_samples(items, config.class_names), figures / "augmentations.png")

# %% [markdown]
# An image, and crops as in training: flipped, turned, scaled, cut, recoloured, small ones filled up
# with others; with `class_crops` some are of other images. Outlines must still lie on the cells. If
# colours look unlike any slide you have, lower `color_jitter`.

# %% [markdown]
# ## Model
# A Mask R-CNN of torchvision's parts on a timm backbone, with small anchors. What differs:
# mask targets are sampled from the instance map, anchors are matched block by block, RoIAlign has a
# quick form for CPUs, and predicted masks become RLEs inside their boxes: no array of N masks is made.

# %%
from src_snippets.model.backbone import build_backbone

# %%
from src_snippets.model.roi_align import CellRoIAlign

# %%
from src_snippets.model.heads import CellRoIHeads

# %%
from src_snippets.model.mask_rcnn import (
    build_model,
    count_parameters,
    plot_anchors,
    with_model_settings,
)

# %%
from src_snippets.model.detect import detect, visible_instances

# %%
if trains:
    config = with_model_settings(config, changes)
    model = build_model(config)
    tag = f" ({model.backbone.body.pretrained_cfg.get('tag')})" * (config.weights == "imagenet")
    print(f"{config.backbone}, weights {config.weights}{tag}:", end=" ")
    print(f"{count_parameters(model) / 1e6:.1f} M trainable parameters")
    boxes = np.concatenate([ground_truth(sample).boxes for sample in train_part])
    sides = (boxes[:, 2:] - boxes[:, :2]) * config.scale
    show_figure(plot_anchors(sides, config), figures / "anchors.png")
    del model

# %% [markdown]
# The model learns a cell best when an anchor, a box of fixed size on a grid, has an IoU (shared / joint area)
# of 0.5 or more with it (from 0.7 on every anchor counts, below only a cell's best). Red dots have none. Many
# beyond the largest anchors: lower `scale`; below the smallest: raise it; beside: change `anchor_ratios`.

# %% [markdown]
# ## Training
# Validation scores, checkpoints, the figure of the training, and the `Trainer` that uses them.

# %%
from src_snippets.training.metrics import average_precision

# %%
from src_snippets.training.checkpoints import (
    check_same_settings,
    code_digest,
    run_folder,
    write_split,
)

# %%
from src_snippets.training.history import LiveHistory

# %%
from src_snippets.training.trainer import launch_training, Session, Trainer

# %% [markdown]
# ### Train
# The figure is drawn anew as epochs end (`best`, `best_large`, `light`: every 50th is validated). Losses should fall and level
# off. A validation score that falls at the end means too many epochs: lower `EPOCHS` or `TRAIN_HOURS`. One
# that still rises means too few, but with a cosine schedule it always does. It is of whole images in one view:
# `tile` and `tta` count below, in *What will the submission score?*

# %%
for path in CHECKPOINTS:  # what does not fit shows now, not after training
    check_same_settings(load_checkpoint(path)["config"], config, path, same=False)

# %%
runs = {}
session, code = Session(config.max_hours), code_digest(TrainingSet, build_model, Trainer)
for fold, split in splits.items():
    folder = run_folder(output, config, dict(split=split, images=samples.digest), code)
    write_split(folder, split, samples)
    if runs and session.is_over() and not (RESUME and (folder / "last.pt").exists()):
        print(f"fold {fold} is not trained: the session ends")
        continue
    print(f"{f'fold {fold}, ' if fold else ''}checkpoints and history.csv: {folder}")
    live = LiveHistory(figures / f"history{fold or ''}.png", config.class_names)
    train_set, val_set = (subset(samples, split[part]) for part in ("train", "val"))
    with session.listen():
        history = launch_training(config, train_set, val_set, folder, session, live, RESUME)
    if history or not runs:  # one that is cut in its first epoch would spoil the ensemble
        runs[fold] = folder

# %% [markdown]
# ## Inference
# Where `tile` is set, images are cut into tiles that overlap by half; `tta` adds flipped and turned
# views. Tiles, views and models are fused by box IoU.

# %%
from src_snippets.inference.predict import predict_test, predict_validation, submission_preview

# %%
from src_snippets.inference.submission import offer_download, write_csv_submissions, write_results

# %% [markdown]
# ### What will the submission score?
# The validation images, predicted as the test images will be (with folds each by the model that was not
# trained on it). `AP50_100` takes the best 100 detections of an image and class, as pycocotools does by
# default, `AP50` all. Differences below about 0.03 are noise: two trainings with the same settings differ as
# much. Weak detections raise AP: where `score_threshold` is above 0.05, a second row shows what it costs. For
# CSV data `submission.csv` holds detections from `export_score_threshold` on, without overlaps (as DQ, PQ).

# %%
require(runs or not trains, "Training was stopped: run its cell again, or all with MAX_HOURS=0.01.")
val_parts = [(runs[fold] / "best.pt", subset(samples, splits[fold]["val"])) for fold in runs]
val_samples = torch.utils.data.ConcatDataset([part for _, part in val_parts] or [[]])
val_predictions = launch(config, predict_validation, val_parts, config) if val_samples else []
preview, advice = submission_preview(val_samples, val_predictions, config)
show_table(preview)
print(advice)

# %% [markdown]
# ### Predict and write the submission
# `test-results.json` and its zip are checked entry by entry before they get their names.

# %%
checkpoints = [folder / "best.pt" for folder in runs.values()]
predictions_folder = checkpoints[0].parent if checkpoints else output
predict_args = (checkpoints, CHECKPOINTS, dataset.test_images, predictions_folder, config)
predictions = launch(config, predict_test, *predict_args) if dataset.test_images else {}
confident_by_id = {key: p.above(config.export_score_threshold) for key, p in predictions.items()}
archive = None
if predictions and dataset.layout != "images":
    submitted = {key: p.above(config.score_threshold) for key, p in predictions.items()}
    _, archive = write_results(submitted, dataset.test_images, output, list(dataset.categories))
if archive and dataset.layout == "csv":
    write_csv_submissions(confident_by_id, dataset.test_images, output, dataset.test_ids)
if not archive:
    print("No test images of a dataset: nothing to submit. A submission in OUT is an earlier one.")

# %% [markdown]
# ## Evaluation
# All on the validation images. Where the epoch was chosen on them (`best_by` is not `last`), the
# numbers are a little optimistic. The submission is written; an error in a figure costs nothing else.
# DICE, AJI, DQ (detection), SQ (segmentation), PQ = DQ x SQ and F1 (centroids within 12 px) are
# those of HoVer-Net, for comparison with publications: of all cells whatever their class, then by
# class.

# %%
from src_snippets.evaluation.matching import (
    ap_interval,
    image_table,
    match_table,
    matches_above,
    score_table,
    wrong_instances,
)

# %%
from src_snippets.evaluation.figures import plot_evaluation, plot_mistakes

# %%
val_truths = [ground_truth(sample, crowds=True) for sample in val_samples]
matches = match_table(val_predictions, val_truths, config.num_classes)
scores = by_image = None
notes = ["The images are synthetic: scores say nothing about real cells."] if is_demo else []
if val_samples:
    with keep_going("the table of scores"):
        scores = score_table(val_samples, val_predictions, config)
        show_table(scores)
    names = [image_stem(sample.name) for sample in val_samples]
    by_image = image_table(matches, names, config.export_score_threshold)
    print("Validation images, the worst first, scores from export_score_threshold on:")
    show_table(by_image.head(8))
    if interval := ap_interval(matches_above(matches, config.score_threshold), len(names)):
        notes += ["AP50 as submitted, 95% CI over images: {:.3f} to {:.3f}".format(*interval)]
print(*notes, sep="\n")

# %%
if val_samples:
    with keep_going("the figure of predictions"):
        chosen = sorted(range(len(val_samples)), key=lambda i: -len(val_truths[i]))[:3]
        confident = [val_predictions[i].above(config.export_score_threshold) for i in chosen]
        exported = matches_above(matches, config.export_score_threshold)
        wrong = [wrong_instances(exported, i) for i in chosen]
        shown = [val_samples[i] for i in chosen]
        figure = plot_predictions(shown, confident, wrong, config.class_names)
        show_figure(figure, figures / "predictions.png")

# %% [markdown]
# The validation images with most cells: image, ground truth, prediction. Crosses mark missed cells in
# the ground truth and false positives in the prediction: IoU below 0.5, another class, a duplicate.

# %%
if val_samples:
    with keep_going("the evaluation figure"):
        show_figure(plot_evaluation(matches, config, len(val_samples)), figures / "evaluation.png")

# %% [markdown]
# A precision curve that ends early: cells that are never detected. One that starts low: confident
# mistakes. If AP50 is higher left of the solid red line, lower `score_threshold`; if F1 (at IoU 0.5) is
# highest elsewhere than at the dashed one, move `export_score_threshold` there: counts hold what scores more.
# *Detections per image*: dots off the dashed line are images counted wrong, the legend has the mean error.
# Off the diagonal of the confusion matrix are confused classes, missed cells and false positives.

# %%
if val_samples:
    with keep_going("the gallery of mistakes"):
        figure = plot_mistakes(val_samples, val_truths, val_predictions, matches, config)
        show_figure(figure, figures / "mistakes.png")

# %% [markdown]
# Solid outlines are ground truth (thick: the cell concerned), dashed ones predictions (dotted: the
# better one of a duplicate). The worst
# come first: missed cells by size, the others by score or number of pieces. A confident false
# positive on what looks like a cell may be a gap in the annotation.

# %% [markdown]
# ## Export
# Label images for Fiji and napari, outlines for QuPath, tables of cells and counts, COCO: all of the predicted
# cells, without overlaps, with scores from `export_score_threshold` on. Your own masks are not measured.
# Without test images the validation images are exported (with `FOLDS = 5` all).

# %%
from src_snippets.export.exports import write_exports

# %%
from src_snippets.export.report import environment_table, write_report

# %%
records, to_export = dataset.test_images, confident_by_id
if not records:
    records = [ImageRecord(s.path, k, *s.size) for k, s in enumerate(val_samples, start=1)]
    confident = (p.above(config.export_score_threshold) for p in val_predictions)
    to_export = dict(enumerate(confident, start=1))
names, counts = dict(zip(dataset.categories, config.class_names, strict=True)), None
with keep_going("the exports"):
    if records:
        counts = write_exports(to_export, records, output / "exports", names, config)

# %%
with keep_going("the figure of test images"):
    items = []
    for record in records[:: max(len(records) // 4, 1)][:4]:
        image = read_image(record.path, config.channels)
        items.append((image, visible_instances(to_export[record.image_id]), record.path))
    if items:
        show_figure(plot_samples(items, config.class_names), figures / "test.png")

# %% [markdown]
# Upper row: images, of the test part where there is one; lower row: the cells predicted in them.

# %%
with keep_going("the report"):
    facts = {"folder": data_root, "layout": dataset.layout, "images": len(samples)}
    facts |= {"test images": len(dataset.test_images), "fingerprint": samples.digest[:16]}
    tables = {"Scores on the validation images": scores, "Exported cells": counts}
    tables["Validation images, worst first"] = by_image
    tables["Data"] = pd.Series(facts).to_frame("value")
    tables["Environment"] = environment_table(gpu_name)
    tables["Settings that differ from the defaults"] = config_table(config).astype(str)
    title = "Synthetic cells" if is_demo else f"Cells in {data_root.name}"
    write_report(output / "report.html", title, notes, tables, since=started)

# %% [markdown]
# ### Download the results
# Submit `test-results.zip`, which holds exactly `test-results.json`; for CSV data `submission.csv`. Counts and
# sizes of cells: `exports/counts.csv`, `exports/cells.csv`. On Kaggle all lie in the Output panel at the right,
# on Colab in the files panel at the left. `report.html` has all figures.

# %%
if is_demo:
    print("DEMO: these cells are synthetic. Do not submit them.")
if scores is not None:
    print(f"validation AP50 {scores['AP50'].iloc[0]:.3f} on {len(val_samples)} images")
if archive:
    offer_download(output / "submission.csv" if dataset.layout == "csv" else archive)
