"""Version folders, checkpoints, whole files and locks: what is written and found again. Knows nothing of models."""
