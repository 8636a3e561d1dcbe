"""The sprite world: captions say what the pixels show."""

from __future__ import annotations

import pytest
import torch

from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.embedded.scenes import (
    LAYOUTS,
    TINTS,
    Scenes,
    all_tints,
    compose,
    draw_scenes,
    seen_tints,
    tinted,
    unseen_tints,
)
from dreamartist_pipeline.embedded.sprites import SpriteSet

SIZE_PX = 32


def make_sprites() -> SpriteSet:
    """Two opaque 8 px squares: a red one and a blue one."""
    images = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    images[:, 3] = 255
    images[0, 0] = 255
    images[1, 2] = 255
    return SpriteSet(images, ("apple", "whale"), ("flat", "flat"))


def make_scene(**changes: torch.Tensor) -> Scenes:
    values = {
        "sprite": torch.tensor([[0.0, -1.0]]),
        "place": torch.tensor([[[0.5, 0.5, 0.5], [0.5, 0.5, 0.0]]]),
        "tint": torch.zeros(1, 2, 4),
        "pattern": torch.zeros(1),
        "colors": torch.tensor([[[255.0, 255.0, 255.0], [0.0, 0.0, 0.0]]]),
        "shift": torch.zeros(1, 2),
    }
    return Scenes(**{**values, **changes})


def test_a_sprite_covers_its_place_and_nothing_else():
    image = compose(make_sprites().images, make_scene(), SIZE_PX)[0]
    assert image[:, 16, 16].tolist() == [1.0, -1.0, -1.0]
    assert image[:, 2, 2].tolist() == [1.0, 1.0, 1.0]
    red = (image[1] < 0).float().mean().item()
    assert abs(red - 0.25) < 0.02  # half the side, a quarter of the area


def test_left_and_right_sprites_are_left_and_right():
    scene = make_scene(sprite=torch.tensor([[0.0, 1.0]]), place=torch.tensor([[[0.25, 0.5, 0.4], [0.75, 0.5, 0.4]]]))
    image = compose(make_sprites().images, scene, SIZE_PX)[0]
    assert image[:, 16, 8].tolist() == [1.0, -1.0, -1.0]
    assert image[:, 16, 24].tolist() == [-1.0, -1.0, 1.0]


def test_every_pattern_but_plain_shows_both_colours():
    for pattern in range(4):
        scene = make_scene(sprite=torch.tensor([[-1.0, -1.0]]), pattern=torch.tensor([float(pattern)]))
        share = (compose(make_sprites().images, scene, SIZE_PX) > 0).float().mean().item()
        assert share == 1.0 if pattern == 0 else 0.3 < share < 0.9


def test_tinting_maps_a_sprites_mean_luminance_to_the_colour():
    gray = torch.full((1, 3, 4, 4), 0.5)
    color = torch.tensor([[0.2, 0.4, 0.8]])
    out = tinted(gray, torch.ones(1, 1, 4, 4), color)
    assert torch.allclose(out[0, :, 0, 0], color[0], atol=1e-5)


def test_the_same_seed_draws_the_same_scenes_and_another_seed_others():
    sprites = make_sprites()
    first, again, other = (draw_scenes(sprites, 50, seed) for seed in (3, 3, 4))
    assert first.captions == again.captions
    assert torch.equal(first.colors, again.colors)
    assert first.captions != other.captions


def test_captions_name_the_object_and_the_background_that_is_painted():
    scenes = draw_scenes(make_sprites(), 200, seed=0)
    for index, caption in enumerate(scenes.captions):
        assert ("apple" if scenes.sprite[index, 0] == 0 else "whale") in caption
        named = [name for name in COLORS if caption.endswith(f", {name} background")]
        if named:
            painted = scenes.colors[index, 0]
            assert (painted - torch.tensor(COLORS[named[0]])).abs().max() <= 12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_name_the_positions_of_objects(layout):
    scenes = draw_scenes(make_sprites(), 600, seed=1)
    drawn = [(i, shown) for i, shown in enumerate(scenes.shown) if shown.layout == layout]
    assert drawn
    for index, shown in drawn:
        sprites = scenes.sprite[index].tolist()
        (x, y, side), (second_x, second_y, _) = scenes.place[index].tolist()
        assert [("apple", "whale")[int(sprite)] for sprite in sprites if sprite >= 0] == list(shown.objects)
        assert all(word in shown.caption for word in shown.objects)
        if layout in ("one", "small"):
            assert (side > 0.6) == (layout == "one")
        else:
            assert (second_x > x, second_y > y) == ((False, True) if layout == "stacked" else (True, False))
        if layout == "twins":
            assert ("two" in shown.caption or "a pair of" in shown.caption) and sprites[0] == sprites[1]


def test_every_layout_has_two_wordings():
    captions = draw_scenes(make_sprites(), 3000, seed=2).captions
    for words in ("a small ", "a tiny ", "two ", "a pair of ", " on the right", " left of ", " above ", " below "):
        assert any(words in caption for caption in captions), words


def test_an_object_is_never_drawn_with_its_two_unseen_tints_in_training():
    shown = draw_scenes(make_sprites(), 2000, seed=3).shown
    tints = {(word, tint) for one in shown for word, tint in zip(one.objects, one.tints, strict=True) if tint}
    for word in ("apple", "whale"):
        assert {tint for name, tint in tints if name == word} == set(seen_tints(word))
        assert set(all_tints(word)) - set(seen_tints(word)) == set(unseen_tints(word))
        assert len(seen_tints(word)) == len(TINTS) - 2


def test_unseen_tints_can_be_drawn():
    shown = draw_scenes(make_sprites(), 500, seed=4, tints_of=unseen_tints).shown
    tints = {(word, tint) for one in shown for word, tint in zip(one.objects, one.tints, strict=True) if tint}
    assert tints == {(word, tint) for word in ("apple", "whale") for tint in unseen_tints(word)}


def test_scenes_with_unnamed_sprites_can_be_drawn_for_the_autoencoder():
    sprites = SpriteSet(make_sprites().images, ("", ""), ("", ""))
    assert sprites.named() == []
    scenes = draw_scenes(sprites, 5, seed=0, choices=[0, 1])
    assert compose(sprites.images, scenes, SIZE_PX).shape == (5, 3, SIZE_PX, SIZE_PX)
