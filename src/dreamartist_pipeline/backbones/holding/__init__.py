"""Base models as people hold them: folders, single files, ids of the Hugging Face hub, a VAE of its own."""
