"""Intruder dimensions: what fine-tuning added that the base does not have."""
