"""Ablation studies: a grid of runs over one frozen base, many trained at a time, and what the outcome says."""
