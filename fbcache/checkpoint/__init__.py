"""Tracked directories and the checkpoints in them."""
