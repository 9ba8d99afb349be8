"""One worker's steps: micro-batches to an update of the weights, exchanges with other workers, sample answers."""
