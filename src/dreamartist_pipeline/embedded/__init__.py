"""The embedded base model and its picture world: sprites, scenes, the judge, pretraining, colour words."""
