"""Planted defects, benign twins, and the proof that each claim can fail."""
