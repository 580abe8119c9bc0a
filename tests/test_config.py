from dataclasses import fields, replace
import os
import re

import pytest

from src_snippets.config import (
    check_setting,
    checkpoints_from,
    Config,
    describe,
    PARTS,
    recipe,
    RECIPES,
    settings_from,
    with_classes,
)


def test_recipe_changes_only_what_it_states():
    config = recipe("baseline", epochs=30)
    changed = {f.name for f in fields(Config) if getattr(config, f.name) != f.default}
    assert changed == {"epochs", *RECIPES["baseline"]}
    assert (config.epochs, config.scale, config.backbone) == (30, 2.0, "resnet50")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_states_no_default(name):
    defaults = {f.name: f.default for f in fields(Config)}
    assert recipe(name).recipe == name
    assert [key for key, value in RECIPES[name].items() if value == defaults[key]] == []


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_default_is_within_its_own_limits(name):
    field = next(f for f in fields(Config) if f.name == name)
    assert check_setting(field, field.default) == field.default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "x"}, "no setting name. There are: seed, "),
        ({"epoch": 3}, "no setting epoch. Did you mean epochs? There are: seed, "),
        ({"epochs": 0}, "epochs=0: expected int from 1 to 10000"),
        ({"epochs": 2.5}, "epochs=2.5: expected int"),
        ({"epochs": True}, "epochs=True: expected int"),
        ({"lr": "fast"}, "lr='fast': expected float from 1e-07 to 1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"flips": 1}, "flips=1: expected True or False"),
        ({"backbone": "vgg"}, "'vgg': expected timm:<a name of timm> or one of resnet10, "),
        ({"anchor_sizes": [8, 16]}, "expected one for each of the 5 levels of pyramid"),
        ({"anchor_ratios": []}, "anchor_ratios"),
        ({"pyramid": [4, 8, 32], "anchor_sizes": [8, 16, 32]}, "expected strides that double"),
        ({"pyramid": [8, 16, 32, 64, 128]}, "from 2 to 64"),
        ({"zoom": [2.0]}, "zoom=[2.0]: expected 2 values of type float from 0.1 to 10.0"),
        ({"zoom": [2.0, 1.0]}, "the least before the most"),
        ({"rpn_iou": [0.7, 0.3]}, "rpn_iou=(0.7, 0.3): expected the least before the most"),
        ({"fold": 3, "folds": 2}, "fold=3: expected at most folds, 2"),
        ({"fold": 1}, "fold=1: expected at most folds, 1"),
        ({"fine_stem": True}, "at most 32, not resnet50 and (4, 8, 16, 32, 64)"),
        ({"fine_stem": True, "backbone": "timm:x"}, "fine_stem: expected one of resnet10"),
    ],
)
def test_wrong_settings_say_what_is_valid(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe("baseline", **changes)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(
        ValueError, match=r"no recipe 'fast'; there are: baseline, attention, .*demo"
    ):
        recipe("fast")


def test_json_values_take_the_fields_types():
    config = recipe("demo", zoom=[1, 2], anchor_ratios=[1], lr=1)
    assert config == replace(config, zoom=(1.0, 2.0), anchor_ratios=(1.0,), lr=1.0)
    assert isinstance(config.lr, float)


def test_settings_from_environment():
    assert settings_from({}) == {}
    assert settings_from({"HW3_SETTINGS": '{"epochs": 3}'}) == {"epochs": 3}
    with pytest.raises(ValueError, match="HW3_SETTINGS is not JSON"):
        settings_from({"HW3_SETTINGS": "{epochs: 3}"})
    with pytest.raises(ValueError, match="expected an object"):
        settings_from({"HW3_SETTINGS": "[3]"})


def test_checkpoints_from_environment():
    assert checkpoints_from({}) == []
    paths = ["/content/drive/My Drive/best.pt", "b.pt"]
    assert checkpoints_from({"HW3_CHECKPOINTS": os.pathsep.join(paths)}) == paths


def test_values_by_class_fit_the_classes():
    config = recipe("demo", least_area=[5, 6, 7], mask_threshold=0.4)
    assert config.mask_threshold == (0.4,)
    names = ("a", "b", "c")
    assert with_classes(config, names) == replace(config, num_classes=3, class_names=names)
    with pytest.raises(ValueError, match=r"least_area=\(5, 6, 7\): expected one value, or one for"):
        with_classes(config, ["a", "b"])


def test_classes_have_names():
    named = recipe("demo", class_names=["round", "long"])
    assert (named.num_classes, named.class_names) == (2, ("round", "long"))
    assert with_classes(named, ["class1", "class2"]) == named  # the user's go over the data's
    with pytest.raises(ValueError, match="expected 3 names; the data call the classes a, b, c"):
        with_classes(named, ["a", "b", "c"])
    assert with_classes(recipe("demo"), ["cell"]).class_names == ("cell",)
    with pytest.raises(ValueError, match="class_names=3: expected values of type str"):
        recipe("demo", class_names=3)
    for names in ([], ["a", ""], ["a", "a"]):
        with pytest.raises(ValueError, match="expected a name a class, each once"):
            recipe("demo", class_names=names)


def test_knobs_that_are_none_change_nothing():
    knobs = dict(epochs=5, lr=None)
    assert settings_from({}, knobs) == {"epochs": 5}
    assert settings_from({"HW3_SETTINGS": '{"epochs": 3}'}, knobs) == {"epochs": 3}


def test_describe_marks_what_differs():
    lines = describe(recipe("baseline", seed=5, score_floor=0.05)).splitlines()
    assert "  > seed             5" in lines
    assert "  * scale            2.0" in lines
    assert "    epochs           50" in lines
    assert "  > score_floor      0.05" in lines  # as the default, but not as the recipe
    assert len(lines) == len(fields(Config)) + 1 + len(PARTS)
