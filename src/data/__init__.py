"""Thin doors to the data sets and the configuration."""
