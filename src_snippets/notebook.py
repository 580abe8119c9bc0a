# %% [markdown]
# # Cell instance segmentation
# Run all cells. The notebook finds the dataset, shows it, trains a Mask R-CNN, measures it on
# images it never learned from, and leaves `test-results.json` and its zip ready to download.
#
# - **Kaggle**: File > Import notebook, add the dataset as input, choose GPU T4 x2, Run All.
# - **Colab**: upload the notebook, choose a GPU runtime, upload the dataset to `/content`, Run all.
# - **No dataset**: a small one is drawn, and everything runs in a few minutes on a CPU.

# %%
from src_snippets.install import ask_gpu, check_gpu, install_missing

# %%
install_missing()

# %% [markdown]
# ## Imports
# All in one place, standard library first.

# %%
from dataclasses import replace
import os

import numpy as np
import torch

# %%
from src_snippets.config import checkpoints_from, describe, recipe, settings_from, with_classes

# %%
from src_snippets.processes import (
    is_first,
    join_processes,
    on_all_gpus,
    private_folder,
)

# %%
join_processes()
gpu = ask_gpu()
check_gpu(gpu)

# %% [markdown]
# ## Settings: change them here
# Leave all as it is for a first run. For a score set `RECIPE = "best"` and `train_hours`. `None` is
# the recipe's own value, which the list below this cell shows. After a change run on from here;
# nothing above has to run again. What changes how the model answers, what is shown, or the time and
# the machine (`max_hours`, `gpus`) goes on with the run that is there; any other change starts one
# of its own, and the earlier one is kept.

# %%
# What, and where to
DATA = os.environ.get("HW3_DATA", "")  # "/content/my_data" or "demo"; empty: search for it
OUT = os.environ.get("HW3_OUT", "")  # where results go; empty: /kaggle/working, else results
CHECKPOINTS = checkpoints_from(os.environ)  # ["/content/best.pt"] of other runs: answer too
RECIPE = os.environ.get("HW3_RECIPE", "")  # see the README; empty: baseline if there is a dataset

KNOBS = dict(
    # How long
    epochs=None,  # 1 to 10,000 passes; more while the validation curve still rises
    train_hours=None,  # h of training, such as 3.5; the rate falls to 0 by then, with cosine
    max_hours=None,  # h of the session: all is written in time; on Kaggle 8.8 (of 12: set 11.8)
    lr=None,  # 1e-7 to 1; lower if losses jump or become nan
    # How large: seconds and memory grow with the square of crop and scale
    batch_size=None,  # 1 to 256 crops a step and GPU; lower when memory runs out
    crop=None,  # 32 to 8192 px; cells at its border are cut
    scale=None,  # 0.25 to 8 network px per image px; 2 shows cells twice as large
    gpus=None,  # 1: one GPU alone, should two make trouble
    # What the model starts from and sees
    class_names=None,  # ["tumour", "other"]: of class1.tif, class2.tif, and so how many
    weights=None,  # "imagenet", "coco" (data beyond ImageNet), "none", or a file
    rare_crops=None,  # 0 to 1, share of crops around cells of rare classes; 0.5 gained
    copy_paste=None,  # 0 to 1, share of crops with cells of other fields; 0.5 gained
    # How it answers
    detections=None,  # 1 to 20,000 cells an image; with fewer than there are AP falls
    score_floor=None,  # 0 to 1; AP gains from a low one, 0.05
    tile=None,  # px, side of tiles; 256 gained on fields up to 1000, takes several times longer
    test_views=None,  # "one", "flips" or "all": symmetries shown; gains, takes 3 or 8 times as long
    tune=None,  # True: thresholds by class, chosen on the validation part
    um_per_px=None,  # micrometres a pixel, for lengths and areas in tables
)
CHANGES = settings_from(os.environ, KNOBS | dict())  # dict(folds=5): any other setting too

# %%
from src_snippets.places import (
    check_free,
    find_dataset,
    fresh_folder,
    has_truth,
    output_folder,
    SEARCHED_FOLDERS,
    session_hours,
)

# %%
from src_snippets.demo import make_demo

# %%
if isinstance(CHECKPOINTS, str):
    raise ValueError(f"CHECKPOINTS={CHECKPOINTS!r}: expected a list, such as [{CHECKPOINTS!r}]")
output = output_folder(OUT) if is_first() else private_folder()
fresh_folder(output / "figures", ".png")  # those of another run would enter the report
found_root = find_dataset(DATA)
chosen_settings = recipe(RECIPE or ("baseline" if found_root else "demo"), **CHANGES)
data_root = found_root or make_demo(output / ".demo-dataset")
if found_root is None:
    print("=" * 78)
    print("DEMO: the images below are drawn; the scores say nothing about real cells.")
    print("For your own, set DATA above to a folder with train/ and its truth (see below),")
    print(f"or put it below {', '.join(SEARCHED_FOLDERS)}; then run from the settings cell on.")
    print("=" * 78)
print(f"dataset: {data_root}\nresults: {output}")
trains = has_truth(data_root)
if trains:
    print(describe(chosen_settings))

# %%
from src_snippets.rle import encode_crop, encode_layers, paint

# %%
from src_snippets.forms import (
    CellSample,
    coco_truth,
    Instances,
    truth_instances,
    with_categories,
    with_crowds,
)

# %%
from src_snippets.readers import read_image

# %%
from src_snippets.checkpoints import epochs_done, load_checkpoint, run_folder, saved_settings

# %%
from src_snippets.stains import as_seen

# %%
from src_snippets.datasets import (
    CellSamples,
    channel_statistics,
    choose_splits,
    describe_groups,
    open_dataset,
    pick,
    sample_records,
    write_json,
)

# %% [markdown]
# Everything is read and checked now; the validation part is chosen by image and never augmented.
# Where `DATA` has pictures alone, nothing is trained: `CHECKPOINTS` answer, with their settings.

# %%
if not (trains or CHECKPOINTS):
    raise ValueError(
        f"{data_root}: pictures without truth; set CHECKPOINTS to a best.pt for them. To learn "
        "from outlines: train/<name>/image.tif with class1.tif beside it, pixel = id of the cell."
    )
for path in CHECKPOINTS:
    load_checkpoint(path)  # what is wrong with one shows now
settings = chosen_settings if trains else saved_settings(CHECKPOINTS[0], CHANGES)
dataset = open_dataset(data_root, settings)
config = with_classes(settings, dataset.categories.values())
names = config.class_names
if not trains:
    print(f"RECIPE is not used; settings of {CHECKPOINTS[0]}:\n{describe(config)}")
samples = CellSamples(dataset, config.cache_gb)
splits = choose_splits(samples, config) if trains else {}
for fold, split in splits.items():
    title = f"fold {fold}: " * (fold > 0)
    print(f"{title}{len(split['train'])} training, {len(split['val'])} validation images")
print(f"{len(dataset.test_images)} images to answer")

# %%
if trains:
    groups = samples.groups(config.split_by)
    print(f"kept together in the split: {describe_groups(groups, dataset.names)}")
    for name, count in zip(names, samples.counts.sum(0)[1:].tolist(), strict=True):
        print(f"{name}: {count} cells" + " WARNING: nothing to learn from" * (count == 0))
    if dataset.layout == "folders" and not samples.counts.sum(0)[1:].all():
        print("Classes without a cell may be found where there are none: name those there are in")
        print('class_names, such as ["cell"] where class1.tif is all.')
    print(f"cells an image: {samples.counts.sum(1).min()} to {samples.counts.sum(1).max()}")
    cap = config.detections if config.tile else min(config.detections, config.proposals)
    if crowded := int((samples.counts.sum(1) > cap).sum()):
        print(f"WARNING: {crowded} images have more cells than can be found: {cap}. Raise")
        print(f"detections (now {config.detections}) and proposals (now {config.proposals}).")
    train_part = pick(samples, next(iter(splits.values()))["train"])
    print(f"to normalise by this dataset instead of ImageNet: {channel_statistics(train_part)}")

# %%
from src_snippets.transforms import magnification, TrainingSet

# %%
from src_snippets.plots import (
    LiveHistory,
    plot_anchors,
    plot_augmentations,
    plot_counts,
    plot_fields,
    plot_predictions,
    plot_schedule,
    plot_thresholds,
    show_figure,
)

# %%
if trains:
    spread = np.unique(np.linspace(0, len(train_part) - 1, 4).astype(int))
    shown = [train_part[i] for i in spread]
    gallery = [(sample.image.numpy(), truth_instances(sample), sample.name) for sample in shown]
    show_figure(plot_fields(gallery, names), output / "figures" / "samples.png")

# %% [markdown]
# Every cell has an outline on its border, in the colour of its class. If outlines and cells are
# apart, image and masks do not belong together.

# %%
if trains:
    torch.manual_seed(config.seed)
    most_cells = int(samples.counts.sum(1)[train_part.indices].argmax())
    seen = TrainingSet(train_part, config)
    variants = [seen.variant(most_cells) for _ in range(5)]
    augmented = plot_augmentations(train_part[most_cells], variants, names)
    show_figure(augmented, output / "figures" / "augmentations.png")

# %% [markdown]
# The same field as training sees it: flipped, turned, magnified, cut and recoloured, with pieces of
# others beside it where it is smaller than `crop`, and with other fields and pasted cells where the
# settings say so. Outlines must still sit on the cells. If colours look unlike any slide you have,
# lower `color_jitter`.

# %%
from src_snippets.weights import read_weights

# %%
from src_snippets.backbones import build_backbone

# %%
from src_snippets.fusion import settle

# %%
from src_snippets.heads import similar_chunks

# %%
from src_snippets.model import (
    anchor_shapes,
    build_model,
    cells_with_anchor,
    checkpoint_bytes,
    describe_anchors,
    parameter_table,
)

# %%
if trains:
    print(f"Mask R-CNN with {config.backbone}, start from weights: {config.weights}")
    first_model = build_model(config)
    print(parameter_table(first_model))
    room = checkpoint_bytes(first_model, config)
    del first_model

# %%
if trains:
    sides = []
    for sample in train_part:
        cells = truth_instances(sample).boxes
        factor = magnification(sample.size, config.scale, config.short_sides[-1])
        sides.append((cells[:, 2:] - cells[:, :2]) * factor)
    sides = np.concatenate(sides)
    covered = cells_with_anchor(sides, config)
    print(describe_anchors(covered))
    anchors = plot_anchors(sides, covered, anchor_shapes(config))
    show_figure(anchors, output / "figures" / "anchors.png")

# %% [markdown]
# The model learns a cell best when an anchor, a box of fixed size, overlaps it by half. Red dots
# far from all crosses ask for other `anchor_sizes` or `anchor_ratios`.

# %%
from src_snippets.evaluate import (
    ap_interval,
    average_precision,
    format_scores,
    hits_of,
    outside_crowds,
    panoptic_quality,
    score_rows,
)

# %%
from src_snippets.predict import SYMMETRIES

# %%
from src_snippets.train import (
    by_image_id,
    fit,
    rate_factor,
    read_trained,
    Session,
)

# %%
from src_snippets.costs import describe_costs, measure_costs

# %%
about = {fold: {"split": split, "images": samples.digest} for fold, split in splits.items()}
folders = {fold: run_folder(output, config, data) for fold, data in about.items()}
epochs_left = sum(config.epochs - epochs_done(folder) for folder in folders.values())
if epochs_left > 0:  # nothing is measured for a run that has ended
    costs = on_all_gpus(config, measure_costs, config, train_part, most_cells)
    batches = max(len(train_part) // config.batch_size // costs.processes, 1)
    steps = -(-batches // config.accumulate)
    rates = [rate_factor(k, config, steps * config.epochs) for k in range(steps * config.epochs)]
    plan = plot_schedule([config.lr * factor for factor in rates])
    show_figure(plan, output / "figures" / "schedule.png")
    held = [s.size for split in splits.values() for s in pick(samples, split["val"])]
    held_mpx = sum(height * width for height, width in held) / 1e6
    looks = held_mpx / len(splits) * epochs_left / config.eval_every
    print(describe_costs(costs, config, steps * epochs_left, looks))

# %%
for path in CHECKPOINTS:
    read_trained(path, config, same=False)  # does it fit? Asked now, not after training

# %%
hours, reserve = session_hours(config.max_hours), 0.0
if epochs_left > 0 and hours:  # time to answer all images and to write what was found
    asked_often = 10 if config.tune else 1  # by tuning, at most
    models = len(splits) + len(CHECKPOINTS)
    test_mpx = sum(image.height * image.width for image in dataset.test_images) / 1e6
    reserve = 120 + 1.5 * costs.answer * (asked_often * held_mpx + models * test_mpx)
    print(f"the session is taken to end after {hours:g} h (max_hours); {reserve / 60:.0f} minutes")
    print("of them are kept for answering")
session = Session(hours, reserve)
session.listen()
unfinished = [run for run in folders.values() if epochs_done(run) < config.epochs]
if unfinished:
    written = sum(path.stat().st_size for run in unfinished for path in run.glob("*.pt"))
    check_free(output, len(unfinished) * room.kept + room.writing - written)

# %%
runs = {}
for fold, split in splits.items():
    if session.told and runs:
        print(f"fold {fold} is not trained: the session ends")
        continue
    session.share(len(splits) - len(runs))
    run = folders[fold]
    parts = {part: pick(samples, own) for part, own in split.items()}
    write_json(split, run / "split.json")
    for part, picked in parts.items():
        part_truth = coco_truth(picked, config.num_classes)
        write_json(with_categories(part_truth, dataset.categories), run / f"{part}_gt.json")
    print(f"fold {fold}, " * (fold > 0) + f"checkpoints, split, truth and history.csv: {run}")
    live = LiveHistory(output / "figures" / f"history{fold or ''}.png", names)
    on_all_gpus(config, fit, config, parts["train"], parts["val"], run, session, live)
    runs[fold] = run

# %% [markdown]
# The picture is drawn anew after each epoch: losses, validation scores, rate, and the validation
# field with most cells as it is answered now. Losses should fall and level off. A validation score
# that falls while losses go on falling means too many epochs; one that still rises at the end means
# too few. The box loss may rise first, when more cells are found.

# %% [markdown]
# ## How good is the best epoch?
# On validation images, which were never trained on. The best epoch was chosen on the same images,
# so the numbers lean a little to the high side. With folds, every image is answered by the one
# model that never saw it: one number for all. `best 100` keeps the best 100 detections of an image
# and class, as many scorers do.

# %%
from src_snippets.thresholds import threshold_lines

# %%
from src_snippets.answers import answer_test, answer_validation, tune_on_validation

# %%
own_checkpoints = [run / "best.pt" for run in runs.values()]
val_parts = [pick(samples, splits[fold]["val"]) for fold in runs]
held_out = [sample for part in val_parts for sample in part]
asked = list(zip(own_checkpoints, val_parts, strict=True))
val_answers = on_all_gpus(config, answer_validation, asked, config) if held_out else []
val_truths, counted = [truth_instances(sample) for sample in held_out], []
if val_answers:
    val_truth = coco_truth(held_out, config.num_classes)
    scores = average_precision(val_truth, by_image_id(val_answers))
    counted = [outside_crowds(*pair) for pair in zip(val_answers, held_out, strict=True)]
    counted = [found.above(config.show_floor) for found in counted]
    quality = panoptic_quality(zip(val_truths, counted, strict=True), config.num_classes)
    crowded_truths = [with_crowds(sample) for sample in held_out]
    val_hits = hits_of(val_answers, crowded_truths, config.num_classes)
    interval = ap_interval(val_hits)
    print(f"{len(val_answers)} validation images, seed {config.seed}")
    score_table = score_rows(scores, quality, names)
    print(format_scores(score_table))
    if interval:
        low, high = interval
        print(f"with other images AP50 would be {low:.3f} to {high:.3f}, in 95 of 100 draws")
    if config.score_floor > 0.1:
        print(f"Scores below score_floor={config.score_floor:g} are left out, which costs AP50.")
        print("Set it to 0.05 and run on from the settings cell: nothing is trained again.")
else:
    print("No validation images: nothing can be said about how good the model is.")

# %%
if val_answers:
    first = range(min(3, len(val_answers)))
    picture = plot_predictions(
        [held_out[i] for i in first],
        [counted[i] for i in first],
        names,
    )
    show_figure(picture, output / "figures" / "predictions.png")

# %% [markdown]
# Left the field, then the truth, then what was found. Look for cells that are missed, merged or
# split, and for colours that differ: a wrong class.

# %%
if val_answers:
    bars = plot_counts(val_truths, counted, names)
    show_figure(bars, output / "figures" / "counts.png")

# %% [markdown]
# Grey and blue bars of about the same height: nothing is systematically missed or invented. Scores
# below `show_floor` are not counted.

# %%
from src_snippets.looks import (
    calibrate,
    count_by_class,
    count_confusions,
    find_mistakes,
    floor_curves,
    match_cells,
    plot_calibration,
    plot_confusions,
    plot_count_errors,
    plot_floors,
    plot_mistakes,
    plot_precision,
    precision_curves,
)

# %%
if val_answers:
    precision = precision_curves(val_truth, by_image_id(val_answers))
    show_figure(plot_precision(precision, names), output / "figures" / "precision.png")

# %% [markdown]
# A curve that drops to zero early: cells that are never found. One that starts low: confident
# mistakes. A large gap from IoU 0.5 to 0.75: loose masks.

# %%
if val_answers:
    floors = plot_floors(*floor_curves(val_hits, config), config, names)
    show_figure(floors, output / "figures" / "floors.png")
    bins = plot_calibration(*calibrate(val_hits))
    show_figure(bins, output / "figures" / "calibration.png")

# %% [markdown]
# AP50 that still rises at its left end asks for a lower `score_floor`, an F1 dot beside its peak
# for another `show_floor`. Calibration bars below the line are scores that promise too much.

# %%
if val_answers:
    matchings = [match_cells(*pair) for pair in zip(counted, val_truths, strict=True)]
    confusions = count_confusions(matchings, config.num_classes)
    show_figure(plot_confusions(confusions, names), output / "figures" / "confusions.png")
    both = (count_by_class(side, config.num_classes) for side in (val_truths, counted))
    show_figure(plot_count_errors(*both, names), output / "figures" / "count_errors.png")

# %% [markdown]
# Dark off the diagonal: two classes are taken for one another; the last column is missed cells, the
# last row, without colour, what finds no cell. Dots below the line are images with too few cells
# found; a small bias with a large MAE is errors that cancel over images.

# %%
if val_answers:
    pictures = [sample.image.numpy() for sample in held_out]
    worst = plot_mistakes(find_mistakes(matchings), matchings, pictures, names)
    show_figure(worst, output / "figures" / "mistakes.png")

# %% [markdown]
# Solid outlines are true cells, dashed ones what was found, the worst first; titles give scores and
# classes of what was found, and what is there. `found again`: a better detection has that cell. A
# confident false positive on what looks like a cell may be a gap in the truth.

# %%
changed = {}
if config.tune and len(val_answers) > 1:
    known = (asked, crowded_truths, val_hits, config)
    tuned = on_all_gpus(config, tune_on_validation, *known)
    changed = tuned.changes
    curves = plot_thresholds(threshold_lines(tuned, config), names)
    show_figure(curves, output / "figures" / "thresholds.png")
    write_json(changed, runs[min(runs)] / "thresholds.json")
    print(f"for the test images: {changed}")
    print(f"AP50 {tuned.before:.3f} with the settings, {tuned.after:.3f} with thresholds of the")
    print("other half of the validation images; chosen and measured on all it would be more")
test_config = replace(config, **changed)

# %% [markdown]
# With `tune` each class gets its own thresholds: dots on the curves. A flat curve matters little,
# that of a class with few cells is chance.

# %%
kept_in = own_checkpoints[0].parent if own_checkpoints else output
asking = (own_checkpoints, CHECKPOINTS, dataset.test_images, kept_in, test_config)
test_answers = on_all_gpus(config, answer_test, *asking)

# %%
from src_snippets.writers import offer_download, write_results, write_submissions

# %%
submits = dataset.test_images and dataset.layout != "pictures"
if submits:
    _, archive = write_results(test_answers, dataset.test_images, output, dataset.categories)
else:
    print("No test images of a dataset: there is nothing to submit.")
strong = {key: a.above(test_config.show_floor) for key, a in test_answers.items()}
if submits and dataset.layout == "table":
    write_submissions(strong, dataset.test_images, output)

# %%
from src_snippets.exports import write_exports

# %%
called = dict(zip(dataset.categories, names, strict=True))
if is_first() and (dataset.test_images or held_out):  # else of the validation images
    if dataset.test_images:
        asked_for, answers, read = dataset.test_images, strong, lambda i: read_image(i.path)
    else:
        asked_for = sample_records(held_out)
        answers, read = by_image_id(counted), lambda i: held_out[i.image_id - 1].image.numpy()
    write_exports(answers, asked_for, read, output / "exports", called, config.um_per_px)

# %%
places = np.unique(np.linspace(0, len(dataset.test_images) - 1, 4).astype(int))
chosen = [dataset.test_images[i] for i in places if dataset.test_images]
answered = []
for image in chosen:
    answered.append((read_image(image.path), strong[image.image_id], image.path.stem))
if answered:
    show_figure(plot_fields(answered, names), output / "figures" / "test.png")

# %% [markdown]
# Test images above, the cells found in them below.

# %%
from src_snippets.report import environment, write_report

# %%
facts = {"folder": data_root, "layout": dataset.layout}
facts |= {"fingerprint": samples.digest[:16]} if trains else {}
facts |= {"images to learn from": len(samples)} if trains else {}
facts |= {"images to answer": len(dataset.test_images)}
cells_there = samples.counts.sum(0)[1:] if trains else ()
facts |= {f"true cells: {n}": k for n, k in zip(names, cells_there, strict=False)}
told = ["DEMO: these images were drawn; the scores say nothing."] if found_root is None else []
told.append(f"Recipe {config.recipe}, seed {config.seed}, {config.backbone}.")
told.append(f"{len(held_out)} validation images, {len(dataset.test_images)} to answer.")
if val_answers and interval:
    told.append("Validation AP50 {:.3f}, {:.3f} to {:.3f}.".format(scores["AP50"], *interval))
exported = list(strong.values()) if dataset.test_images else counted
tally = count_by_class(exported, config.num_classes).sum(0).tolist()
tally = dict(zip(names, tally, strict=True))
shown_from = (test_config if dataset.test_images else config).show_floor  # one, or one a class
floors_said = " / ".join(f"{floor:g}" for floor in shown_from)
chapters = {f"Cells found, scores from {floors_said} on": tally, "Data": facts}
chapters["Environment"] = environment(gpu["name"])
shown_scores = score_table if val_answers else []
page = (told, shown_scores, chapters, describe(test_config))
titled = "Cells of the drawn demo" if found_root is None else f"Cells in {data_root.name}"
write_report(output / "report.html", titled, *page)

# %% [markdown]
# ## Take it with you
# `test-results.zip` holds exactly `test-results.json`, checked entry by entry. Submit the zip where
# your course or competition takes it; for data in tables, `submission.csv` or, where rows are
# numbered, `submission-idx.csv`. On Kaggle they also lie in the Output panel at the right.

# %%
if val_answers:
    print(f"validation AP50 {scores['AP50'] or 0:.3f} on {len(val_answers)} images")
if dataset.test_images:
    total, shown_cells = (sum(map(len, side.values())) for side in (test_answers, strong))
    print(f"{len(test_answers)} images, settings {config.recipe}: {total} detections of all")
    print(f"scores, {shown_cells} of them cells with scores from {floors_said} on")
if submits and found_root is None:
    print("DEMO: these cells were drawn. Do not submit them.")
if submits:
    offer_download(output / "submission.csv" if dataset.layout == "table" else archive)
