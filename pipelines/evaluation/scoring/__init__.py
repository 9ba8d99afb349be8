"""The rules by which answers are read and scored, a module per family of benchmarks."""
