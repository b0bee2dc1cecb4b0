"""Sparse autoencoders over activations: training, metrics, attribution. Nothing is here yet; a later version fills it."""
