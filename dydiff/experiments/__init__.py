"""Experiment files, what they build, and the processes that run their variants."""
