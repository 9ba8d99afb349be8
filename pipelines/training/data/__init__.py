"""Rows of training data: read in their forms, frozen, checked, ordered, and prepared as examples. Knows no torch."""
