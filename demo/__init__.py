"""The demo: drawn pictures with known captions, and the training of the model that captions them. Knows no Ray."""
