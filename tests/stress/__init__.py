"""Stress scripts, run by tests in small and by hand in large: chaos, fuzz, bombs."""
