"""Kernels in numba. Nothing here is imported before somebody computes: numba takes a second to load."""
