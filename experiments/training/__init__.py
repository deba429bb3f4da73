"""Pieces of a fine-tuning run: settings, loss, optimiser, evaluation, logs and the loop."""
