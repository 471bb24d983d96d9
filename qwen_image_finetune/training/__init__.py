"""One run, from a configuration to its last checkpoint; `train.py` is the only loop. May know all rooms below."""
