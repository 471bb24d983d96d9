"""This machine: its processes, signals, devices and terminal. May know nothing of models or data."""
