"""The sheets: every image is present, readable, and in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dreamartist_pipeline.core.figures import (
    CELL_PX,
    SheetSection,
    contact_sheet,
    fit_cell,
    overlay,
    prompt_sheet,
    prompt_table,
    wrap,
)

_COLORS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black", "gray")


def _plain(color: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def _section(**changes: object) -> SheetSection:
    fields = {
        "title": "With the trigger word",
        "left_heading": "base model",
        "right_heading": "with the trigger word",
        "prompts": ["a my-fox, blue background", "a my-fox, red background"],
        "left": [[_plain("red"), _plain("lime")], [_plain("blue"), _plain("yellow")]],
        "right": [[_plain("cyan"), _plain("magenta")], [_plain("black"), _plain("gray")]],
        "seeds": [1, 2],
    }
    return SheetSection(**{**fields, **changes})  # type: ignore[arg-type]


def _places(sheet: Image.Image, color: str) -> tuple[int, int, int]:
    """Return (left, top, count) of the pixels that have exactly this colour."""
    rgb = Image.new("RGB", (1, 1), color).getpixel((0, 0))
    mask = [index for index, value in enumerate(sheet.get_flattened_data()) if value == rgb]
    return min(i % sheet.width for i in mask), min(i // sheet.width for i in mask), len(mask)


def test_every_picture_is_on_the_sheet_enlarged() -> None:
    sheet = contact_sheet(_plain("orange"), "fox", ["one line"], [_section()])
    for color in (*_COLORS, "orange"):
        assert _places(sheet, color)[2] >= (CELL_PX[0] - 4) ** 2, color


def test_rows_are_prompts_columns_are_seeds_and_blocks_lie_side_by_side() -> None:
    sheet = contact_sheet(_plain("orange"), "fox", [], [_section()])
    left = {color: _places(sheet, color)[:2] for color in _COLORS}
    assert left["red"][0] == left["blue"][0] < left["lime"][0] < left["cyan"][0] < left["magenta"][0]
    assert left["red"][1] == left["lime"][1] == left["cyan"][1] < left["blue"][1] == left["yellow"][1]


def test_sections_follow_one_another_downwards() -> None:
    second = _section(
        title="Without the trigger word",
        prompts=["a cat"],
        left=[[_plain("navy")]],
        right=[[_plain("maroon")]],
        seeds=[1],
    )
    sheet = contact_sheet(_plain("orange"), "fox", [], [_section(), second])
    assert _places(sheet, "navy")[1] > _places(sheet, "blue")[1] + CELL_PX[0]
    assert _places(sheet, "maroon")[0] > _places(sheet, "navy")[0]


def test_large_pictures_are_shrunk_and_keep_their_shape() -> None:
    wide = (1024, 512)
    pictures = [[_plain("red", wide)]]
    section = _section(prompts=["a"], seeds=[1], left=pictures, right=pictures)
    sheet = contact_sheet(_plain("orange", wide), "fox", [], [section])
    assert _places(sheet, "orange")[2] == pytest.approx(CELL_PX[1] * CELL_PX[1] // 2, rel=0.05)


def test_long_lines_under_the_title_are_wrapped_and_make_room() -> None:
    short = contact_sheet(_plain("orange"), "fox", ["word"] * 5, [_section()])
    long = contact_sheet(_plain("orange"), "fox", ["word " * 60] * 5, [_section()])
    assert long.width == short.width
    assert long.height > short.height
    right_edge = long.crop((long.width - 30, 0, long.width, 200))
    assert right_edge.getcolors() == [(30 * 200, (255, 255, 255))]


def test_the_same_pictures_make_the_same_sheet() -> None:
    first, second = (contact_sheet(_plain("orange"), "fox", ["x"], [_section()]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_fit_cell_pads_instead_of_stretching() -> None:
    cell = fit_cell(_plain("red", (50, 100)), (100, 100))
    assert cell.getpixel((50, 50)) == (255, 0, 0)
    assert cell.getpixel((5, 50)) == (255, 255, 255)


def test_wrap_breaks_between_words_and_long_words_at_hyphens_only() -> None:
    font = ImageFont.load_default(16)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = wrap("a small fox on a very green background", font, 100)
    assert " ".join(lines) == "a small fox on a very green background"
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrap("a my-fox-on-a-hill", font, 60) == ["a", "my-fox-", "on-a-hill"]
    assert wrap("Donaudampfschifffahrtsgesellschaft", font, 40) == ["Donaudampfschifffahrtsgesellschaft"]


def test_a_missing_picture_is_reported_with_its_section() -> None:
    section = _section(right=[[_plain("cyan")], [_plain("black")]])
    with pytest.raises(ValueError, match=r"right of section 'With the trigger word', got 2 rows of \[1\]"):
        contact_sheet(_plain("orange"), "fox", [], [section])


def test_a_sheet_needs_a_section() -> None:
    with pytest.raises(ValueError, match="sections is empty"):
        contact_sheet(_plain("orange"), "fox", [], [])


# --------------------------------------------------------------------------------------------- prompts × seeds


def test_a_prompt_sheet_has_a_row_per_prompt_and_a_column_per_seed() -> None:
    rows = [[Image.new("RGB", (64, 64), color) for color in row] for row in (("red", "lime"), ("blue", "black"))]
    sheet = prompt_sheet(["a fox", "two foxes"], [3, 4], rows)
    cells = [
        sheet.getpixel((36 + 250 + column * (144 + 8) + 72, 36 + 24 + row * (144 + 8) + 72))
        for row in range(2)
        for column in range(2)
    ]
    assert cells == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]


def test_a_long_prompt_makes_its_rows_high_enough_to_be_read() -> None:
    row = [Image.new("RGB", (64, 64))]
    short, long = (prompt_sheet(["a fox " * n], [0], [row]) for n in (1, 80))
    assert long.height > short.height + 100


def test_the_picture_that_drawing_started_from_has_a_column_of_its_own() -> None:
    rows = [[Image.new("RGB", (64, 64), "red")]]
    bare = prompt_sheet(["a fox"], [0], rows)
    sheet = prompt_sheet(["a fox"], [0], rows, before=Image.new("RGB", (64, 64), "blue"))
    assert sheet.width == bare.width + 144 + 8
    assert sheet.getpixel((36 + 250 + 72, 36 + 24 + 72)) == (0, 0, 255)


def test_rows_that_do_not_fit_prompts_and_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got rows of \[1\]"):
        prompt_sheet(["a fox"], [0, 1], [[Image.new("RGB", (8, 8))]])


def test_a_prompt_table_has_a_column_per_heading() -> None:
    table = prompt_table(["a fox"], ["step 0", "step 5"], [[_plain("red"), _plain("blue")]])
    assert _places(table, "red")[0] + 144 + 8 == _places(table, "blue")[0]
    with pytest.raises(ValueError, match="1 rows of 2 images"):
        prompt_table(["a fox"], ["step 0", "step 5"], [[_plain("red")]])


def test_a_map_is_dark_where_it_is_low_and_bright_where_it_is_high() -> None:
    shares = torch.linspace(0, 1, 32).repeat(32, 1)
    shown = np.asarray(overlay(Image.new("RGB", (32, 32), "gray"), shares).convert("L")).astype(int)
    assert (np.diff(shown[0]) >= 0).all()
    assert shown[0, -1] - shown[0, 0] > 80
