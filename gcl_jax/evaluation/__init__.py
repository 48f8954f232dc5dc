"""Ranked evaluation: judgements, results, comparisons, and what CLIP models are asked besides."""
