"""A concept as an MLflow model: written by `packaging`, stored and registered by `dataset`, run by `model`."""
