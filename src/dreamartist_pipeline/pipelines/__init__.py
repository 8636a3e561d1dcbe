"""One folder a stage: nodes and their wiring."""
