"""Image sheets: contact sheets of an evaluation, grids of prompts × seeds, and maps over pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL_PX = (144, 256)  # minimum and maximum of an image's longer side on a sheet

_PAPER = "#ffffff"
_INK = "#1c1c22"
_SOFT_INK = "#6d6d78"
_RULE = "#d9d9e0"
_BLOCK = "#f4f4f7"
_ACCENT = "#3457d5"
_MARGIN = 36
_GAP = 8
_BLOCK_PAD = 14
_BLOCK_GAP = 24
_LABEL_PX = 250
_HEADING_PX, _LABEL_TEXT_PX, _SMALL_PX, _TITLE_PX = 20, 17, 14, 34
_BLOCK_HEAD_PX = 62  # heading of a block and seeds of its columns
_COLOR_SCALE = "Viridis"  # of plotly; its lightness grows evenly, with and without colour vision
_NUM_COLORS = 256
_OPACITY = 0.7  # of the map over the picture

Row = Sequence[Image.Image]


@dataclass(frozen=True)
class SheetSection:
    """Two blocks side by side with the same prompts (rows) and seeds (columns).

    Attributes:
        title: of the section.
        left_heading: of the left block.
        right_heading: of the right block.
        prompts: one per row.
        left: images of the left block, one per prompt and seed.
        right: images of the right block.
        seeds: one per column.
    """

    title: str
    left_heading: str
    right_heading: str
    prompts: Sequence[str]
    left: Sequence[Row]
    right: Sequence[Row]
    seeds: Sequence[int]


def contact_sheet(
    reference: Image.Image, title: str, lines: Sequence[str], sections: Sequence[SheetSection]
) -> Image.Image:
    """Lay out a contact sheet: the reference image, a title with some lines of text, then the sections.

    Images are resized such that the longer side is 144 to 256 px.

    Args:
        reference: the reference image.
        title: the subject.
        lines: text below the title, e.g. trigger word and scores.
        sections: at least one.

    Raises:
        ValueError: there is no section, or the images of a section do not match its prompts and seeds.
    """
    if not sections:
        raise ValueError("a contact sheet needs at least one section; sections is empty")
    for section in sections:
        _check_section(section)
    cell = _cell_size(sections[0].left[0][0])
    width = max(_section_width(section, cell) for section in sections) + 2 * _MARGIN
    width_left = width - _header_left(cell) - _MARGIN
    lines = [part for line in lines for part in wrap(line, _font(_LABEL_TEXT_PX), width_left)]
    height = _header_height(lines, cell) + sum(_section_height(section, cell) for section in sections) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    _draw_header(sheet, reference, title, lines, cell)
    y = _header_height(lines, cell)
    for section in sections:
        _draw_section(sheet, section, y, cell)
        y += _section_height(section, cell)
    return sheet


def prompt_sheet(
    prompts: Sequence[str], seeds: Sequence[int], rows: Sequence[Row], before: Image.Image | None = None
) -> Image.Image:
    """Lay out prompts × seeds: one labelled row per prompt, and one column per seed.

    Args:
        prompts: one per row.
        seeds: one per column.
        rows: one image per prompt and seed.
        before: the initial image, shown in an extra column on the left.

    Raises:
        ValueError: the images do not match prompts and seeds.
    """
    headings = [f"seed {seed}" for seed in seeds]
    if before is None:
        return prompt_table(prompts, headings, rows)
    return prompt_table(prompts, ["started from", *headings], [[before, *row] for row in rows])


def prompt_table(prompts: Sequence[str], headings: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Lay out one labelled row per prompt, and one column per heading.

    Args:
        prompts: one per row.
        headings: one per column.
        rows: one image per prompt and heading; the last image of the first row sets the size of the cells.

    Raises:
        ValueError: the images do not match prompts and headings.
    """
    if not prompts or len(rows) != len(prompts) or {len(row) for row in rows} != {len(headings)}:
        raise ValueError(
            f"expected {len(prompts)} rows of {len(headings)} images, got rows of {[len(row) for row in rows]}"
        )
    cell = _cell_size(rows[0][-1])
    row_px = max(cell[1], *(_label_height(prompt) for prompt in prompts))
    left, top = _MARGIN + _LABEL_PX, _MARGIN + _SMALL_PX + 10
    width = left + len(headings) * (cell[0] + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, top + len(rows) * (row_px + _GAP) - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((left + column * (cell[0] + _GAP), _MARGIN), heading, fill=_SOFT_INK, font=_font(_SMALL_PX))
    for index, (prompt, images) in enumerate(zip(prompts, rows, strict=True)):
        y = top + index * (row_px + _GAP)
        _draw_label(draw, prompt, y, row_px)
        for column, image in enumerate(images):
            place = (left + column * (cell[0] + _GAP), y + (row_px - cell[1]) // 2)
            sheet.paste(fit_cell(image, cell), place)
            _frame(draw, place, cell, _RULE)
    return sheet


def fit_cell(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """Fit an image into a cell (width, height), with padding."""
    return ImageOps.pad(image.convert("RGB"), cell, Image.Resampling.LANCZOS, color=_PAPER)


def _check_section(section: SheetSection) -> None:
    for side, rows in (("left", section.left), ("right", section.right)):
        columns = {len(row) for row in rows}
        if len(rows) != len(section.prompts) or columns != {len(section.seeds)}:
            raise ValueError(
                f"expected {len(section.prompts)} rows of {len(section.seeds)} images on the {side} of section "
                f"{section.title!r}, got {len(rows)} rows of {sorted(columns)}"
            )


# ---------------------------------------------------------------------------------------------- sizes


def _cell_size(image: Image.Image, limits_px: tuple[int, int] = CELL_PX) -> tuple[int, int]:
    longer = max(image.size)
    scale = min(max(longer, limits_px[0]), limits_px[1]) / longer
    return round(image.width * scale), round(image.height * scale)


def _block_width(section: SheetSection, cell: tuple[int, int]) -> int:
    columns = len(section.seeds)
    return max(columns * cell[0] + (columns - 1) * _GAP, 260) + 2 * _BLOCK_PAD


def _section_width(section: SheetSection, cell: tuple[int, int]) -> int:
    return _LABEL_PX + 2 * _block_width(section, cell) + _BLOCK_GAP


def _block_height(section: SheetSection, cell: tuple[int, int]) -> int:
    rows = len(section.prompts)
    return _BLOCK_HEAD_PX + rows * cell[1] + (rows - 1) * _GAP + _BLOCK_PAD


def _section_height(section: SheetSection, cell: tuple[int, int]) -> int:
    return _HEADING_PX + 26 + _block_height(section, cell) + 30


def _header_left(cell: tuple[int, int]) -> int:
    return _MARGIN + max(cell[0] + 32, _LABEL_PX)


def _header_height(lines: Sequence[str], cell: tuple[int, int]) -> int:
    return _MARGIN + max(cell[1] + 28, _TITLE_PX + 20 + 26 * len(lines)) + 18


# ---------------------------------------------------------------------------------------------- drawing


def _draw_header(
    sheet: Image.Image, reference: Image.Image, title: str, lines: Sequence[str], cell: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(sheet)
    sheet.paste(fit_cell(reference, cell), (_MARGIN, _MARGIN))
    _frame(draw, (_MARGIN, _MARGIN), cell, _ACCENT, width=2)
    draw.text((_MARGIN, _MARGIN + cell[1] + 8), "reference image", fill=_SOFT_INK, font=_font(_SMALL_PX))
    x = _header_left(cell)
    draw.text((x, _MARGIN - 6), title, fill=_INK, font=_font(_TITLE_PX))
    for index, line in enumerate(lines):
        draw.text((x, _MARGIN + _TITLE_PX + 14 + 26 * index), line, fill=_SOFT_INK, font=_font(_LABEL_TEXT_PX))


def _draw_section(sheet: Image.Image, section: SheetSection, y: int, cell: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.line((_MARGIN, y, sheet.width - _MARGIN, y), fill=_RULE, width=1)
    draw.text((_MARGIN, y + 12), section.title, fill=_INK, font=_font(_HEADING_PX))
    top = y + _HEADING_PX + 26
    first_row = top + _BLOCK_HEAD_PX
    for index, prompt in enumerate(section.prompts):
        _draw_label(draw, prompt, first_row + index * (cell[1] + _GAP), cell[1])
    left = _MARGIN + _LABEL_PX
    right = left + _block_width(section, cell) + _BLOCK_GAP
    _draw_block(sheet, section, (left, top), cell, heading=section.left_heading, rows=section.left, color=_SOFT_INK)
    _draw_block(sheet, section, (right, top), cell, heading=section.right_heading, rows=section.right, color=_ACCENT)


def _draw_block(
    sheet: Image.Image,
    section: SheetSection,
    corner: tuple[int, int],
    cell: tuple[int, int],
    *,
    heading: str,
    rows: Sequence[Row],
    color: str,
) -> None:
    draw = ImageDraw.Draw(sheet)
    x, y = corner
    width, height = _block_width(section, cell), _block_height(section, cell)
    draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius=10, fill=_BLOCK)
    _draw_fitting(draw, (x + _BLOCK_PAD, y + 10), heading, color, width - 2 * _BLOCK_PAD)
    for column, seed in enumerate(section.seeds):
        left = x + _BLOCK_PAD + column * (cell[0] + _GAP)
        draw.text((left, y + _BLOCK_HEAD_PX - 21), f"seed {seed}", fill=_SOFT_INK, font=_font(_SMALL_PX))
        for row, images in enumerate(rows):
            place = (left, y + _BLOCK_HEAD_PX + row * (cell[1] + _GAP))
            sheet.paste(fit_cell(images[column], cell), place)
            _frame(draw, place, cell, _RULE)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, y: int, height: int) -> None:
    """Write a prompt to the left of its row, wrapped and vertically centred."""
    font = _font(_LABEL_TEXT_PX)
    wrapped = "\n".join(wrap(text, font, _LABEL_PX - 24))
    draw.multiline_text((_MARGIN, y + height / 2), wrapped, fill=_INK, font=font, spacing=6, anchor="lm")


def _label_height(text: str) -> int:
    """Return the height of a prompt as `_draw_label` writes it."""
    return len(wrap(text, _font(_LABEL_TEXT_PX), _LABEL_PX - 24)) * (_LABEL_TEXT_PX + 8)


def _draw_fitting(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, color: str, width_px: int) -> None:
    font = _font(_LABEL_TEXT_PX)
    first = wrap(text, font, width_px)
    draw.text(place, first[0] + (" …" if len(first) > 1 else ""), fill=color, font=font)


def _frame(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], cell: tuple[int, int], color: str, width: int = 1
) -> None:
    draw.rectangle((place[0], place[1], place[0] + cell[0] - 1, place[1] + cell[1] - 1), outline=color, width=width)


# ---------------------------------------------------------------------------------------------- text


def wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Break a text into lines of at most `width_px`, between words, and at the hyphens of words that are too long."""
    lines: list[str] = []
    for word in text.split() or [""]:
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines += _break_word(word, font, width_px)
    return lines


def _break_word(word: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Break a word that is too long after its hyphens; parts without hyphens are not broken."""
    pieces = [""]
    for part in word.replace("-", "-\n").split("\n") if font.getlength(word) > width_px else [word]:
        if pieces[-1] and font.getlength(pieces[-1] + part) > width_px:
            pieces.append(part)
        else:
            pieces[-1] += part
    return pieces


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's default font, which is scalable with FreeType."""
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so it has no scalable font; install it from its wheel")
    return font


# ---------------------------------------------------------------------------------------------- compared settings

_THUMB_PX = (96, 128)  # minimum and maximum of the longer side of an image in a cell of several
_TEXT_LINE_PX = _SMALL_PX + 5
_CELL_PAD, _MARK_PX = 8, 3
_LEAST_SHEET_PX = 760  # so that title and lines are readable with few columns


@dataclass(frozen=True)
class SheetCell:
    """What one setting gives.

    Attributes:
        images: the same number in every cell.
        texts: short lines below them, such as measures; as many in every cell.
        mark: such as "recommended"; a marked cell has a frame, and this text.
    """

    images: Row
    texts: Sequence[str]
    mark: str = ""


def setting_sheet(
    title: str,
    lines: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[SheetCell]],
) -> Image.Image:
    """Lay out settings in rows and columns, the images of each in a nearly square block.

    Args:
        title: of the sheet.
        lines: of text below the title.
        rows: a heading per row.
        columns: a heading per column.
        cells: one per row and column.

    Raises:
        ValueError: the cells do not match the headings, or have no images, or different numbers of them.
    """
    _check_cells(rows, columns, cells)
    first = cells[0][0]
    thumb = _cell_size(first.images[0], _THUMB_PX if len(first.images) > 1 else CELL_PX)
    width, height = _setting_size(first, thumb)
    left = _MARGIN + _LABEL_PX // 2
    sheet_px = max(left + len(columns) * (width + _GAP) - _GAP + _MARGIN, _LEAST_SHEET_PX)
    wrapped = [part for line in lines for part in wrap(line, _font(_SMALL_PX), sheet_px - 2 * _MARGIN)]
    top = _MARGIN + _TITLE_PX + 14 + _TEXT_LINE_PX * len(wrapped) + 22 + _TEXT_LINE_PX
    sheet = Image.new("RGB", (sheet_px, top + len(rows) * (height + _GAP) - _GAP + _MARGIN), _PAPER)
    _draw_texts(sheet, title, wrapped)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(columns):
        draw.text((left + column * (width + _GAP), top - _TEXT_LINE_PX - 4), heading, fill=_INK, font=_font(_SMALL_PX))
    for index, (heading, row) in enumerate(zip(rows, cells, strict=True)):
        y = top + index * (height + _GAP)
        _draw_row_heading(draw, heading, y, height)
        for column, cell in enumerate(row):
            _draw_cell(sheet, cell, (left + column * (width + _GAP), y), (width, height), thumb)
    return sheet


def _check_cells(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[SheetCell]]) -> None:
    counts = {len(cell.images) for row in cells for cell in row}
    if len(cells) != len(rows) or {len(row) for row in cells} != {len(columns)} or len(counts) != 1 or not min(counts):
        raise ValueError(
            f"expected {len(rows)} rows of {len(columns)} cells with as many images each, got rows of "
            f"{[len(row) for row in cells]} cells and {sorted(counts)} images"
        )


def _draw_texts(sheet: Image.Image, title: str, lines: Sequence[str]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, fill=_INK, font=_font(_TITLE_PX))
    top = _MARGIN + _TITLE_PX + 14
    for index, line in enumerate(lines):
        draw.text((_MARGIN, top + _TEXT_LINE_PX * index), line, fill=_SOFT_INK, font=_font(_SMALL_PX))


def _setting_size(cell: SheetCell, thumb: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of a cell with its texts and mark."""
    across = _columns_of(len(cell.images))
    down = -(-len(cell.images) // across)
    images_px = across * thumb[0] + (across - 1) * 2, down * thumb[1] + (down - 1) * 2
    texts_px = _TEXT_LINE_PX * (len(cell.texts) + 1)  # and the mark
    return max(images_px[0], 150) + 2 * _CELL_PAD, images_px[1] + texts_px + 2 * _CELL_PAD + 4


def _columns_of(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _draw_row_heading(draw: ImageDraw.ImageDraw, text: str, y: int, height: int) -> None:
    wrapped = "\n".join(wrap(text, _font(_SMALL_PX), _LABEL_PX // 2 - 12))
    draw.multiline_text((_MARGIN, y + height / 2), wrapped, fill=_INK, font=_font(_SMALL_PX), spacing=5, anchor="lm")


def _draw_cell(
    sheet: Image.Image, cell: SheetCell, corner: tuple[int, int], size: tuple[int, int], thumb: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(sheet)
    x, y = corner
    box = (x, y, x + size[0] - 1, y + size[1] - 1)
    draw.rectangle(box, fill=_BLOCK, outline=_ACCENT if cell.mark else None, width=_MARK_PX)
    across = _columns_of(len(cell.images))
    for index, image in enumerate(cell.images):
        place = (
            x + _CELL_PAD + index % across * (thumb[0] + 2),
            y + _CELL_PAD + index // across * (thumb[1] + 2),
        )
        sheet.paste(fit_cell(image, thumb), place)
    top = y + size[1] - _CELL_PAD - _TEXT_LINE_PX * (len(cell.texts) + 1)
    for line, text in enumerate(cell.texts):
        draw.text((x + _CELL_PAD, top + _TEXT_LINE_PX * line), text, fill=_INK, font=_font(_SMALL_PX))
    below = top + _TEXT_LINE_PX * len(cell.texts)
    draw.text((x + _CELL_PAD, below), cell.mark, fill=_ACCENT, font=_font(_SMALL_PX))


def note_sheet(text: str) -> Image.Image:
    """Return a sheet that says why there is nothing else on it."""
    lines = wrap(text, _font(_LABEL_TEXT_PX), _LEAST_SHEET_PX - 2 * _MARGIN)
    sheet = Image.new("RGB", (_LEAST_SHEET_PX, 2 * _MARGIN + (_LABEL_TEXT_PX + 8) * len(lines)), _PAPER)
    place = (_MARGIN, _MARGIN)
    ImageDraw.Draw(sheet).multiline_text(place, "\n".join(lines), fill=_INK, font=_font(_LABEL_TEXT_PX), spacing=6)
    return sheet


# ---------------------------------------------------------------------------------------------- maps


def overlay(image: Image.Image, shares: torch.Tensor) -> Image.Image:
    """Return the luminance of a picture under a colour-coded map.

    Args:
        image: the picture.
        shares: 0 to 1, `[H, W]` of the picture.
    """
    index = (shares.clamp(0, 1) * (_NUM_COLORS - 1)).round().to(torch.uint8).numpy()
    colored = Image.fromarray(_colors()[index])
    return Image.blend(image.convert("L").convert("RGB"), colored, _OPACITY)


def _colors() -> np.ndarray:
    """Return the colours from 0 to 1, uint8 `[256, 3]`."""
    from plotly.colors import sample_colorscale

    points = [index / (_NUM_COLORS - 1) for index in range(_NUM_COLORS)]
    colors = sample_colorscale(_COLOR_SCALE, points, colortype="tuple")
    return (np.array(colors) * 255).round().astype(np.uint8)
