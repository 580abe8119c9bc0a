from dataclasses import replace

from hypothesis import given, settings, strategies
import numpy as np
import pycocotools.mask

from src_snippets.config import recipe
from src_snippets.forms import Instances
from src_snippets.fusion import clusters, fuse, join_tiles, mask_nms, settle, vote, without_overlaps
from src_snippets.rle import encode_crops


def make_answer(masks, scores, labels=None) -> Instances:
    """An answer of (N, H, W) masks."""
    masks = np.asarray(masks, bool).reshape(-1, *np.shape(masks)[-2:])
    zeros = np.zeros(len(masks), np.int64)
    rles = encode_crops(masks, zeros, zeros, *masks.shape[1:])
    xywh = np.array(pycocotools.mask.toBbox(rles)).reshape(-1, 4)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32)
    labels = zeros + 1 if labels is None else np.array(labels)
    return Instances(boxes, np.array(scores, np.float32), labels, rles, masks.shape[1:])


def decoded(found: Instances) -> np.ndarray:
    return np.array([pycocotools.mask.decode(rle) for rle in found.rles], bool)


ROWS = [[[1, 1, 1, 0, 0, 0]], [[0, 1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 1]], [[0, 0, 1, 1, 0, 0]]]


def test_mask_nms_worked_by_hand():
    found = make_answer(ROWS, [0.5, 0.9, 0.6, 0.7], [1, 2, 3, 4])
    # By score: 1, 3, 2, 0. IoU of 1 with 3 is 1/3, with 0 2/3; of 3 with 2 is 1/4.
    assert mask_nms(found, 0.5).labels.tolist() == [2, 4, 3]
    assert mask_nms(found, 0.3).labels.tolist() == [2, 3]  # 3 goes and so cannot drop 2
    assert mask_nms(found, 0.0).labels.tolist() == [2, 3]
    assert mask_nms(found, 0.99).labels.tolist() == [2, 4, 3, 1]


def test_overlaps_go_to_the_better_one():
    found = without_overlaps(make_answer(ROWS, [0.5, 0.9, 0.6, 0.7]))
    assert decoded(found)[:, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 1, 0, 0],
    ]
    assert found.boxes.tolist() == [[0, 0, 1, 1], [1, 0, 3, 1], [4, 0, 6, 1], [3, 0, 4, 1]]
    hidden = without_overlaps(make_answer(ROWS[:2], [0.9, 0.5], [3, 4]))
    assert hidden.labels.tolist() == [3]


def dense_nms(masks, scores, most) -> list[int]:
    """The same on dense masks, pair by pair."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        union = [(masks[i] | masks[j]).sum() for j in kept]
        shared = [(masks[i] & masks[j]).sum() for j in kept]
        if all(s <= most * u for s, u in zip(shared, union, strict=True)):
            kept.append(int(i))
    return kept


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from([0.1, 0.45, 0.7]))
def test_survivors_are_those_of_dense_masks(seed, most):
    rng = np.random.default_rng(seed)
    masks = np.zeros((30, 24, 20), bool)
    for mask in masks:
        y, x, side = rng.integers(0, 18), rng.integers(0, 14), rng.integers(2, 8)
        mask[y : y + side, x : x + side] = True
    scores = np.round(rng.random(30), 1).astype(np.float32)  # with ties
    found = make_answer(masks, scores, np.arange(30))
    assert mask_nms(found, most).labels.tolist() == dense_nms(masks, scores, most)
    apart = without_overlaps(found)
    assert decoded(apart).sum(0).max() == 1
    assert np.array_equal(decoded(apart).any(0), masks.any(0))


def test_equal_scores_keep_the_first():
    found = make_answer(ROWS[:2], [0.5, 0.5], [7, 8])
    assert decoded(without_overlaps(found))[:, 0].sum(1).tolist() == [3]
    assert mask_nms(found, 0.5).labels.tolist() == [7]


def test_chunks_of_rows_change_nothing():
    rng = np.random.default_rng(0)
    found = make_answer(rng.random((40, 6, 7)) < 0.3, rng.random(40), np.arange(40))
    whole = mask_nms(found, 0.2).labels.tolist()
    assert 2 < len(whole) < 40
    assert mask_nms(found, 0.2, rows=7).labels.tolist() == whole


def test_nothing_and_settings():
    nothing = make_answer(np.zeros((0, 4, 5)), [])
    found = make_answer(ROWS, [0.5, 0.9, 0.6, 0.7])
    config = recipe("baseline", mask_nms=0.5, overlaps=False)
    assert len(mask_nms(nothing, 0.5)) == len(without_overlaps(nothing)) == 0
    assert len(settle(nothing, config)) == 0
    assert settle(found, recipe("baseline")) is found
    assert len(settle(found, config)) == 3
    assert decoded(settle(found, config)).sum(0).max() == 1


def test_models_joined_worked_by_hand():
    first = make_answer([ROWS[0], ROWS[2]], [0.9, 0.6], [1, 3])
    second = make_answer([ROWS[1], ROWS[2], ROWS[2]], [0.6, 0.3, 0.2], [1, 3, 3])
    third = make_answer([ROWS[1]], [0.8], [2])
    config = recipe("demo", fusion_iou=0.5, score_floor=0.01)
    # IoU of rows 0 and 1 is 2/3: one cell if the class is the same. A model has one voice a cell.
    joined = fuse([first, second, third], config)
    assert joined.labels.tolist() == [1, 3, 2, 3]
    assert np.allclose(joined.scores, [1.5 / 3, 0.9 / 3, 0.8 / 3, 0.2 / 3])
    assert joined.rles == [first.rles[0], first.rles[1], third.rles[0], second.rles[2]]
    strict = fuse([first, second, third], recipe("demo", fusion_iou=0.7, score_floor=0.01))
    assert sorted(strict.labels.tolist()) == [1, 1, 2, 3, 3]
    assert len(fuse([first, second, third], recipe("demo", detections=2))) == 2
    high = fuse([first, second, third], recipe("demo", score_floor=0.28))
    assert high.labels.tolist() == [1, 3]  # the floor holds for the joined scores
    empty = first.select(first.scores > 1)
    assert np.allclose(fuse([first, empty], config).scores, [0.45, 0.3])
    assert len(fuse([empty, empty], config)) == 0


def test_joining_in_blocks_gives_the_same():
    rng = np.random.default_rng(0)
    masks = np.zeros((90, 12, 12), bool)
    for mask in masks:
        y, x, h, w = rng.integers(0, 8, 2).tolist() + rng.integers(2, 6, 2).tolist()
        mask[y : y + h, x : x + w] = True
    every = make_answer(masks, np.sort(rng.random(90))[::-1], rng.integers(1, 3, 90))
    owners = rng.integers(0, 3, 90)
    whole, blocks = (list(clusters(every, owners, 0.5, rows=rows)) for rows in (1000, 4))
    assert whole == blocks
    assert sorted(index for own in whole for index in own) == list(range(90))
    assert max(map(len, whole)) > 1


def test_a_vote_takes_the_pixels_that_half_of_the_scores_want():
    rows = [[[1, 1, 1, 1, 0, 0]], [[0, 1, 1, 1, 1, 0]], [[0, 0, 1, 1, 1, 1]]]
    found = make_answer(rows, [0.5, 0.3, 0.2])
    voted = vote(found)
    # Voices: 0.5, 0.8, 1, 1, 0.5, 0.2 of 1.
    assert decoded(voted)[0].astype(int).tolist() == [[1, 1, 1, 1, 1, 0]]
    assert np.allclose(voted.boxes, [[0.7, 0, 4.7, 1]])
    assert voted.scores.tolist() == found.scores[:1].tolist()
    unsure = vote(make_answer(rows, [0.0, 0.0, 0.0]))
    assert decoded(unsure)[0].astype(int).tolist() == [[0, 1, 1, 1, 1, 0]]
    together = fuse([found.select([k]) for k in range(3)], recipe("demo", fusion_iou=0.3))
    assert together.rles == voted.rles
    assert np.allclose(together.scores, [1 / 3])
    best = fuse([found.select([k]) for k in range(3)], recipe("demo", fusion_iou=0.3, vote=False))
    assert best.rles == found.rles[:1]


def test_tiles_joined_worked_by_hand():
    whole = make_answer([[[0, 0, 1, 1, 1, 1, 0, 0]], [[0, 0, 0, 0, 0, 0, 1, 1]]], [0.4, 0.9])
    piece = make_answer([[[0, 0, 1, 1, 1, 0, 0, 0]], [[1, 1, 0, 0, 0, 0, 0, 0]]], [0.8, 0.3])
    cut = [np.array([False, False]), np.array([True, True])]
    joined = join_tiles([whole, piece], cut, recipe("demo"))
    # The better but cut piece gives way to the whole cell; a piece of a cell nobody holds stays.
    assert np.allclose(joined.scores, [0.9, 0.4, 0.3])
    again = make_answer([[[0, 0, 1, 1, 1, 1, 1, 0]]], [0.6])
    joined = join_tiles([whole, again], [cut[0], np.array([False])], recipe("demo"))
    assert np.allclose(joined.scores, [0.9, 0.6])  # of doubles the better one
    alone = join_tiles([whole.select([0, 0])], [cut[0]], recipe("demo"))
    assert len(alone) == 2  # of one tile nothing is dropped


def test_small_cells_may_be_left_out():
    found = make_answer(ROWS, [0.5, 0.9, 0.6, 0.7])
    assert (
        settle(found, recipe("demo", least_area=3)).scores.tolist() == found.scores[[0, 2]].tolist()
    )


def test_thresholds_by_class():
    rows = [[[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 1, 1, 1, 0, 0, 0, 0]]] * 2
    found = replace(make_answer(rows, [0.9, 0.8, 0.7, 0.6]), labels=np.array([1, 1, 2, 2]))
    kept = settle(found, recipe("demo", class_nms=[0.5, 1.0]))
    assert np.allclose(kept.scores, [0.9, 0.7, 0.6])  # of class 1 the weaker double goes
    assert len(settle(found, recipe("demo", class_nms=0.5))) == 2
    kept = settle(found, recipe("demo", least_area=[4, 1]))
    assert np.allclose(kept.scores, [0.9, 0.7, 0.6])
    assert np.allclose(found.above([0.85, 0.65]).scores, [0.9, 0.7])
    assert len(found.above([0.85])) == 1
    empty = found.select([])
    assert len(settle(empty, recipe("demo", class_nms=0.5, least_area=[4, 1]))) == 0
    assert len(empty.above([0.5])) == 0


def test_thousands_of_detections_are_joined_in_seconds():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 990, (5000, 2))
    crops = np.ones((5000, 10, 10), bool)
    rles = encode_crops(crops, corners[:, 0], corners[:, 1], 1000, 1000)
    boxes = np.concatenate([corners[:, ::-1], corners[:, ::-1] + 10], 1).astype(np.float32)
    labels = rng.integers(1, 5, 5000)
    found = Instances(boxes, rng.random(5000, np.float32), labels, rles, (1000, 1000))
    shuffled = found.select(rng.permutation(5000))
    joined = fuse([found, shuffled], recipe("demo", score_floor=0.0, detections=20_000))
    assert len(joined) == 5000
    assert np.allclose(np.sort(joined.scores), np.sort(found.scores))


def random_answers(rng, count=8, size=(14, 11)):
    """What three models say of an image: some of the same rectangles, with scores of their own."""
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        y, x, h, w = (*rng.integers(0, 9, 2), *rng.integers(1, 6, 2))
        mask[y : y + h, x : x + w] = True
    labels = rng.integers(1, 4, count)
    sides = [rng.permutation(count)[: rng.integers(0, count + 1)] for _ in range(3)]
    return [make_answer(masks[s], rng.random(len(s)), labels[s]) for s in sides]


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 2**31), strategies.booleans(), strategies.sampled_from([0.3, 0.7]))
def test_what_is_joined_keeps_what_all_outputs_rely_on(seed, vote, iou):
    rng = np.random.default_rng(seed)
    answers = random_answers(rng)
    config = recipe("demo", fusion_iou=iou, vote=vote, score_floor=0.0, detections=20)
    joined = fuse(answers, config)
    masks = np.concatenate([decoded(a).reshape(-1, 14, 11) for a in answers])
    found = decoded(joined).reshape(-1, 14, 11)
    assert found.any((1, 2)).all()
    assert not (found.any(0) & ~masks.any(0)).any()  # no pixel that nobody named
    assert (np.diff(joined.scores) <= 0).all()
    every = np.concatenate([a.scores for a in answers])
    assert len(every) == 0 or (joined.scores <= every.max() + 1e-6).all()
    assert {*joined.labels} == {*np.concatenate([a.labels for a in answers])}
    for label in {*joined.labels}:  # no fewer than the model that found most of a class
        most = max(int((a.labels == label).sum()) for a in answers)
        assert (joined.labels == label).sum() >= most
    # The order of the models changes nothing but the order of ties.
    again = fuse(answers[::-1], config)
    assert np.allclose(np.sort(again.scores), np.sort(joined.scores))
