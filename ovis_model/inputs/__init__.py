"""Images and text -> model input, on CPUs: tiles, prompts, keyframes. Never loads torch."""
