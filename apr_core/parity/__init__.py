"""Parity: a reference and a candidate computed the same thing, how closely, and where they first do not."""
