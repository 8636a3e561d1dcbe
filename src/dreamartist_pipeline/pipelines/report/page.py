"""The page from its template. Jinja escapes all texts; only charts, which matplotlib escapes, are markup."""

from __future__ import annotations

import jinja2

from dreamartist_pipeline.pipelines.report.charts import color_rules
from dreamartist_pipeline.pipelines.report.contents import Contents

_TEMPLATE, _STYLE = "report.html.jinja", "report.css"


def render(contents: Contents) -> str:
    """Return the page as HTML that refers to nothing outside it."""
    templates = jinja2.PackageLoader(__package__, "templates")
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, _, _ = templates.get_source(environment, _STYLE)
    colors = frozenset[str]().union(*(chart.colors for chart in contents.charts))
    return environment.get_template(_TEMPLATE).render(
        page=contents,
        facts=contents.facts,
        style=style,
        light=color_rules(colors, is_dark=False),
        dark=color_rules(colors, is_dark=True),
    )
