"""Data: files to examples, and the order of batches."""
