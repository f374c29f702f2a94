"""Datasets made here: behaviour policies, the episodes that they record, and the files' schema."""
