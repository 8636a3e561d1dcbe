"""Base models: the only package that imports diffusers and transformers."""
