"""Tables of the speed benchmarks: printed as markdown, written as markdown, JSON and a bar chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "08_reporting" / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One line of a table: a label, and numbers by column; a column may be missing."""

    label: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """The result of a benchmark.

    Attributes:
        name: of the files.
        title: of table and chart.
        facts: machine, versions and settings.
        rows: the table.
        plotted: the column in the chart.
        notes: sentences below the table, such as whether a target is reached.
    """

    name: str
    title: str
    facts: Mapping[str, Any]
    rows: Sequence[Row]
    plotted: str
    notes: Sequence[str] = field(default=())

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row.values))

    def markdown(self) -> str:
        """Return facts, table and notes."""
        facts = "; ".join(f"{name}: {value}" for name, value in self.facts.items())
        lines = [
            f"# {self.title}",
            "",
            facts,
            "",
            f"| | {' | '.join(self.columns)} |",
            f"|---|{'---:|' * len(self.columns)}",
        ]
        for row in self.rows:
            cells = [_number(row.values[column]) if column in row.values else "" for column in self.columns]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *self.notes])

    def write(self, folder: Path = FOLDER) -> Path:
        """Print the table, and write NAME.md, NAME.json and NAME.html; return the folder."""
        print(f"\n{self.markdown()}\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.markdown() + "\n", encoding="utf-8")
        rows = [{"label": row.label, **row.values} for row in self.rows]
        content = {"title": self.title, "facts": dict(self.facts), "rows": rows, "notes": list(self.notes)}
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        self._chart().write_html(folder / f"{self.name}.html", include_plotlyjs="cdn")
        print(f"written to {folder}/{self.name}.md, .json and .html")
        return folder

    def _chart(self) -> Any:
        import plotly.graph_objects as go

        shown = [row for row in self.rows if self.plotted in row.values]
        bars = go.Bar(y=[row.label for row in shown], x=[row.values[self.plotted] for row in shown], orientation="h")
        figure = go.Figure(bars)
        figure.update_layout(title=self.title, xaxis_title=self.plotted, template="plotly_white", margin={"l": 320})
        figure.update_yaxes(autorange="reversed")
        return figure


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
