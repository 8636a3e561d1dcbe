"""Training configurations of the reference toolkit (HCP-Diffusion), translated into this project's parameters.

Nothing in such a file is run or imported: class names under `_target_` are compared with the supported ones, resolvers
are not called, and '512*512' is read as a product of numbers. Whatever is not translated is reported with a reason.
"""

from __future__ import annotations

from dreamartist_pipeline.interop.toolkit_config.imported import ImportedConfig, read_toolkit_config
from dreamartist_pipeline.interop.toolkit_config.words import SLOT

__all__ = ["SLOT", "ImportedConfig", "read_toolkit_config"]
