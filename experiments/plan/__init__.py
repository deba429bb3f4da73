"""Whether a fine-tuning run fits, and how fast it can be: the real training step, compiled from shapes alone."""
