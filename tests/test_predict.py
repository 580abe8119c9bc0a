from dataclasses import replace

import numpy as np
import pytest
import torch

from src_snippets.datasets import read_test_mapping
from src_snippets.fusion import fuse
from src_snippets.model import build_model, detect
from src_snippets.predict import detect_together, predict_images
from src_snippets.readers import BadInput, read_image


def test_every_test_image_gets_an_answer(demo_root, tiny_config):
    images = read_test_mapping(demo_root)
    model = build_model(tiny_config)
    answers = predict_images([(model, tiny_config)], images, tiny_config)
    assert list(answers) == [1, 2, 3]
    assert [a.size for a in answers.values()] == [(i.height, i.width) for i in images]
    alone = detect(model, [torch.from_numpy(read_image(images[1].path))], tiny_config)[0]
    assert np.array_equal(answers[2].boxes, alone.boxes)
    assert answers[2].rles == alone.rles
    assert predict_images([(model, tiny_config)], [], tiny_config) == {}


def test_a_broken_image_is_named(demo_root, tiny_config, tmp_path):
    image = read_test_mapping(demo_root)[0]
    broken = image._replace(path=tmp_path / "broken.tif")
    broken.path.write_bytes(image.path.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"broken\.tif: (cut short|cannot be read)"):
        predict_images([(build_model(tiny_config), tiny_config)], [broken], tiny_config)


def test_several_models_answer_together(demo_root, tiny_config):
    image = torch.from_numpy(read_image(read_test_mapping(demo_root)[0].path))
    other = replace(tiny_config, seed=1, backbone="mobilenet_v2", score_floor=0.0)
    members = [(build_model(own), own) for own in (tiny_config, other)]
    alone = [detect(model, [image], own)[0] for model, own in members]
    together = detect_together(members, image, tiny_config)
    assert len(together) == min(len(fuse(alone, tiny_config)), tiny_config.detections)
    assert together.rles == fuse(alone, tiny_config).rles
    assert detect_together(members[:1], image, tiny_config).rles == alone[0].rles
