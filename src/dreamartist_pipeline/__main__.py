"""Run the project as an installed package: `python -m dreamartist_pipeline --pipeline train`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

logging.disable(logging.INFO)  # when it is imported, Kedro names its own logging configuration, which is replaced
from kedro.framework.cli.utils import find_run_command  # noqa: E402
from kedro.framework.project import configure_project  # noqa: E402

logging.disable(logging.NOTSET)


def main(*args: Any, **kwargs: Any) -> Any:
    """Run the `kedro run` command of this project."""
    package_name = Path(__file__).parent.name
    configure_project(package_name)
    for name in ("kedro", "py.warnings"):  # until the logging of the configuration is applied
        logging.getLogger(name).setLevel(logging.ERROR)
    kwargs["standalone_mode"] = not hasattr(sys, "ps1")
    return find_run_command(package_name)(*args, **kwargs)


if __name__ == "__main__":
    main()
