"""The method itself: plain torch, numpy and PIL."""
