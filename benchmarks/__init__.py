"""Measurements: each module is a command whose figures the docs quote."""
