"""Constrained decoding: regular expressions and JSON schemas as masks over tokens. Never loads torch."""
