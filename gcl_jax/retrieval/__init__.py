"""Exact search by inner product, on whatever devices there are."""
