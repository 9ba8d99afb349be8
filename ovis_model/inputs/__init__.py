"""Images and text -> model input, on CPUs: tiles, prompts, key frames. Never loads torch."""
