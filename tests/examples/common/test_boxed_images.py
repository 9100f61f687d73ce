"""Images with boxes: where a box is after letterboxing and variation, its pixels are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from common.average_precision import Labels
from common.boxed_images import augment, letterbox, recolour, stack_labelled, to_tensor

BOX = torch.tensor([[30.0, 20.0, 70.0, 50.0]])


def scene() -> tuple[Image.Image, Labels]:
    """A red box on blue."""
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[..., 2] = 200
    pixels[20:50, 30:70] = (200, 0, 0)
    return Image.fromarray(pixels), Labels(BOX, torch.tensor([5]), torch.tensor([False]))


def extent_of_red(image: Image.Image) -> list[int]:
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] > pixels[..., 2] + 60)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_letterbox_shows_the_image_whole_and_leads_back() -> None:
    image, labels = scene()
    shown, placement = letterbox(image, 96)
    assert shown.size == (96, 96)
    assert shown.getpixel((48, 4)) == (127, 127, 127)
    assert shown.getpixel((2, 48)) == (0, 0, 200)
    torch.testing.assert_close(placement.forth(labels.boxes), torch.tensor([[24.0, 32.0, 56.0, 56.0]]))
    torch.testing.assert_close(placement.back(placement.forth(labels.boxes)), labels.boxes)
    assert np.abs(np.array(extent_of_red(shown)) - [24, 32, 56, 56]).max() <= 1


def test_varied_images_keep_their_labels_around_their_pixels() -> None:
    image, labels = scene()
    seen = 0
    for seed in range(60):
        torch.manual_seed(seed)
        shown, rows = augment(image, labels, 128)
        assert shown.size == (128, 128)
        for number, *box in rows.tolist():
            assert number == 5
            assert min(box) >= 0
            assert max(box) <= 1
            left, top = box[0] - box[2] / 2, box[1] - box[3] / 2
            expected = np.array([left, top, left + box[2], top + box[3]]) * 128
            # The colours vary: red may be any hue near it, but the background is never near that.
            hue = np.asarray(shown.convert("HSV")).astype(int)
            near_red = (np.minimum(hue[..., 0], 256 - hue[..., 0]) < 45) & (hue[..., 1] > 80)
            ys, xs = np.nonzero(near_red)
            assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - expected).max() <= 3
            seen += 1
    assert seen > 40


def test_variation_follows_the_seed() -> None:
    image, labels = scene()
    torch.manual_seed(3)
    first, second = augment(image, labels, 64), augment(image, labels, 64)
    torch.manual_seed(3)
    again = augment(image, labels, 64)
    assert torch.equal(to_tensor(first[0]), to_tensor(again[0]))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(to_tensor(first[0]), to_tensor(second[0]))


def test_crowds_and_boxes_of_no_size_are_no_labels() -> None:
    image, _ = scene()
    boxes = torch.cat([BOX, torch.tensor([[40.0, 30.0, 40.0, 30.0]])])
    for seed in range(10):
        torch.manual_seed(seed)
        _, rows = augment(image, Labels(boxes, torch.tensor([1, 2]), torch.tensor([True, False])), 64)
        assert rows.shape == (0, 5)


def test_colours_turn() -> None:
    red = Image.new("RGB", (2, 2), (200, 0, 0))
    assert recolour(red, 0.0, 1.0, 1.0).getpixel((0, 0)) == (200, 0, 0)
    assert recolour(red, 1 / 3, 1.0, 1.0).getpixel((0, 0))[1] > 190
    assert recolour(red, 0.0, 1.0, 0.5).getpixel((0, 0)) == (100, 0, 0)


def test_labels_of_varying_length_are_filled_up() -> None:
    x, y = stack_labelled([(torch.zeros(3, 4, 4), torch.ones(2, 5)), (torch.ones(3, 4, 4), torch.zeros(0, 5))])
    assert x.shape == (2, 3, 4, 4)
    assert y.shape == (2, 2, 5)
    assert (y[1] == -1).all()
