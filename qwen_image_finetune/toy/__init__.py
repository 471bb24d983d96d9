"""A drawn world, small enough to learn on a laptop: faces and their segmentation masks."""
