"""References -> pixels: fetch bytes, decode images and videos, choose frames."""
