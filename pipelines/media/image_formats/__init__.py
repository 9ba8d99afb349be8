"""What Pillow alone does not know of image files: names by content, more layouts, more formats."""
