"""Let a person accept or correct answers of a run in a local page."""
