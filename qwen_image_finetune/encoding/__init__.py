"""Pairs through the frozen encoders, once, and the cache of what comes out. May know families and data."""
