"""Parts of `score_one_shot.py`: prompts, recognition, tables."""
