"""Observe a job while it runs: progress, rates and the reasons of failed rows."""
