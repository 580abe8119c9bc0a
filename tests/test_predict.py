import numpy as np
import pytest
import torch

from src_snippets.model import build_model, detect
from src_snippets.predict import predict_images
from src_snippets.readers import BadInput, read_image, read_test_mapping


def test_every_test_image_gets_an_answer(demo_root, tiny_config):
    images = read_test_mapping(demo_root)
    model = build_model(tiny_config)
    answers = predict_images(model, images, tiny_config)
    assert list(answers) == [1, 2, 3]
    assert [a.size for a in answers.values()] == [(i.height, i.width) for i in images]
    alone = detect(model, [torch.from_numpy(read_image(images[1].path))], tiny_config)[0]
    assert np.array_equal(answers[2].boxes, alone.boxes)
    assert answers[2].rles == alone.rles
    assert predict_images(model, [], tiny_config) == {}


def test_a_broken_image_is_named(demo_root, tiny_config, tmp_path):
    image = read_test_mapping(demo_root)[0]
    broken = image._replace(path=tmp_path / "broken.tif")
    broken.path.write_bytes(image.path.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"broken\.tif: (cut short|cannot be read)"):
        predict_images(build_model(tiny_config), [broken], tiny_config)
