from dataclasses import fields, replace
import re

import pytest

from src_snippets.setup.config import (
    BEST,
    change_config,
    check_setting,
    Config,
    config_table,
    make_config,
    read_settings,
    RECIPES,
    RENAMED,
    with_class_names,
)


def test_a_recipe_changes_only_what_it_states():
    config = make_config("baseline", epochs=30)
    changed = {f.name for f in fields(Config) if getattr(config, f.name) != f.default}
    assert changed == {"epochs", *RECIPES["baseline"]}
    assert (config.epochs, config.scale, config.backbone) == (30, 2.0, "resnet50")


def test_baseline_keeps_what_it_stands_for():
    config = make_config("baseline")
    assert config.anchor_sizes == (8, 16, 32, 64, 128)
    assert config.anchor_ratios == (0.5, 1.0, 2.0)
    assert (config.detections, config.box_nms, config.clip_norm) == (200, 0.3, 1.0)
    assert (config.score_threshold, config.mask_threshold) == (0.5, 0.6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_states_no_default(name):
    defaults = {f.name: f.default for f in fields(Config)}
    assert make_config(name).recipe == name
    base = BEST if name in ("best", "best_large", "light") else {}  # whose values they change
    said = RECIPES[name].items()
    assert [k for k, value in said if value == defaults[k] and base.get(k, value) == value] == []


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_default_is_within_its_own_limits(name):
    field = next(f for f in fields(Config) if f.name == name)
    assert check_setting(field, field.default) == field.default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "x"}, "no setting name. There are: seed, "),
        ({"recipe": "best"}, "no setting recipe"),
        ({"epoch": 3}, "no setting epoch. Did you mean epochs? There are: seed, "),
        ({"zoom": [1, 2]}, "Setting zoom is called scale_jitter now."),
        ({"epochs": 0}, "epochs=0: expected int as in the default 50, from 1 to 10000."),
        ({"epochs": 10_001}, "epochs=10001: expected int as in the default 50, from 1 to 10000."),
        ({"epochs": 2.5}, "epochs=2.5: expected int"),
        ({"epochs": True}, "epochs=True: expected int"),
        ({"lr": "fast"}, "lr='fast': expected float as in the default 0.0001, from 1e-07 to 1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"flips": 1}, "flips=1: expected bool as in the default True."),
        ({"tta": "all"}, "tta='all': expected one of none, flips, d4."),
        (
            {"anchor_sizes": [8, 16]},
            "expected int as in the default (8, 16, 32, 64, 128), from 2 to 2048",
        ),
        ({"anchor_ratios": []}, "anchor_ratios"),
        (
            {"channels": [1, 2, 3, 4]},
            "channels=[1, 2, 3, 4]: expected int as in the default (), 3 at most, from 1 to 64",
        ),
        ({"channels": [0]}, "from 1 to 64"),
        ({"channels": [1.5]}, "channels=[1.5]: expected int"),
        (
            {"scale_jitter": [2.0]},
            "scale_jitter=[2.0]: expected float as in the default (0.8, 1.25), from 0.1",
        ),
        ({"scale_jitter": [2.0, 1.0]}, "expected from <= to"),
        ({"fold": 3, "folds": 2}, "fold=3: expected at most 2, folds=2"),
        ({"fold": 1}, "fold=1: expected at most 0, folds=1"),
        ({"class_names": 3}, "class_names=3: expected str as in the default ('class1', "),
        ({"class_names": [str(k) for k in range(256)]}, "255 at most."),
        ({"class_names": ["a", ""]}, "expected one name per class, each once"),
        ({"class_names": ["a", "a"]}, "expected one name per class, each once"),
    ],
)
def test_wrong_settings_say_what_is_valid(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config("baseline", **changes)


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match=r"no recipe 'fast'; there are: baseline, .*demo"):
        make_config("fast")


def test_renamed_settings_point_to_settings_that_are_there():
    known = {f.name for f in fields(Config)}
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known


def test_json_values_take_the_fields_types():
    assert make_config("demo", channels=[2, 1]).channels == (2, 1)
    assert make_config("demo", channels=[]).channels == ()
    config = make_config("demo", scale_jitter=[1, 2], anchor_ratios=[1], lr=1)
    assert config == replace(config, scale_jitter=(1.0, 2.0), anchor_ratios=(1.0,), lr=1.0)
    assert isinstance(config.lr, float)
    assert change_config(config, {}) == config


def test_settings_from_the_environment_come_on_top():
    assert read_settings({}, {}) == {}
    changes = dict(epochs=5, lr=0.1)
    assert read_settings(changes, {"HW3_SETTINGS": '{"epochs": 3}'}) == dict(epochs=3, lr=0.1)
    with pytest.raises(ValueError, match=r"expected a JSON object .*property name"):
        read_settings({}, {"HW3_SETTINGS": "{epochs: 3}"})
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_settings({}, {"HW3_SETTINGS": "[3]"})


def test_class_names_of_the_user_go_over_those_of_the_dataset():
    named = make_config("demo", class_names=["round", "long"])
    assert (named.num_classes, named.class_names) == (2, ("round", "long"))
    assert with_class_names(named, ["class1", "class2"]) == named
    with pytest.raises(ValueError, match="expected 3 names, for the dataset's classes a, b, c in"):
        with_class_names(named, ["a", "b", "c"])
    with pytest.raises(ValueError, match="classes long, round in this order"):
        with_class_names(named, ["long", "round"])
    assert with_class_names(named, ["round", "oval"]) == named
    assert with_class_names(make_config("demo"), ["cell"]).class_names == ("cell",)


def test_the_table_shows_what_differs_and_who_changed_it():
    table = config_table(make_config("baseline", seed=5, mask_threshold=0.4))
    assert table.loc["seed"].tolist() == [5, 0, 0]
    assert table.loc["mask_threshold"].tolist() == [0.4, 0.6, 0.5]
    assert table.loc["scale"].tolist() == [2.0, 2.0, 1.0]
    assert "epochs" not in table.index
    named = config_table(make_config("demo", class_names=["a", "b"]))
    assert named.loc["class_names", "value"] == ("a", "b")
    back = config_table(make_config("baseline", box_nms=0.5))  # the default, but not the recipe's
    assert back.loc["box_nms"].tolist() == [0.5, 0.3, 0.5]
