"""Training configurations of the reference toolkit (HCP-Diffusion), translated into this project's parameters.

Nothing in a file is run or imported: class names under `_target_` are compared with the supported ones, resolvers are
not called, and '512*512' is parsed as a product. Values that are not translated are reported with a reason.
"""

from __future__ import annotations

from dreamartist_pipeline.interop.toolkit_config.imported import ImportedConfig, read_toolkit_config
from dreamartist_pipeline.interop.toolkit_config.words import SLOT

__all__ = ["SLOT", "ImportedConfig", "read_toolkit_config"]
