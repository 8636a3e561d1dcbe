"""The only door to diffusers and transformers."""
