"""Objectives over a global batch of scored pairs."""
