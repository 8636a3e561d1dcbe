"""Base models: all that imports diffusers and transformers."""
