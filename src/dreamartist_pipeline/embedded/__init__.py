"""The embedded base model and its images: sprites, scenes, colour words, pretraining, and the judge."""
