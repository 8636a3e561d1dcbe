"""Read the facts of a markdown table, so that tests leave its wording free."""

from __future__ import annotations

import re


def cells(table: str, label: str) -> list[str]:
    """Return the cells of the only row whose first cell starts with `label`, without that cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (row,) = [row for row in rows if row[0].startswith(label)]
    return row[1:]


def numbers(text: str) -> list[float]:
    """Return the numbers of a cell."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
