"""Observe a run while it works: progress, rates and the reasons of failed rows."""
