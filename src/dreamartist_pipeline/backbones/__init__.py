"""Base models: the only package that imports diffusers and transformers."""

import logging


def _concerns_users(record: logging.LogRecord) -> bool:
    """Return False for the remark that image processors without torchvision use PIL, as this project means them to."""
    return "requires torchvision (not installed)" not in record.getMessage()


logging.getLogger("transformers.utils.import_utils").addFilter(_concerns_users)  # before diffusers imports transformers
