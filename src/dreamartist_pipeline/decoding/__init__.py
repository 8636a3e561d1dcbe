"""Decoders of files from others, one per format: bounds first, then content, and no error but InputError."""
