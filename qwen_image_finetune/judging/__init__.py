"""What a run has learnt, measured and shown on pages. May know drawing and the rooms below it."""
