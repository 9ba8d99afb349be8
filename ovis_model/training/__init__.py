"""Training: examples, batches, losses, trainable parts, optimizer and export. Knows no files of data and no cluster."""
