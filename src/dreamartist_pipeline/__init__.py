"""DreamArtist++ as Kedro pipelines: one reference image in, a trained pair of adapters and embeddings out."""
