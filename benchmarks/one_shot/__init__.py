"""What `score_one_shot.py` is made of beside the judge: prompts, recognition, tables."""
