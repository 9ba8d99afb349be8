"""Stress scripts: chaos, fuzz, bombs. Tests run a small version, people the large one by hand."""
