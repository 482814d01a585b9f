"""BLIP: the models that score, train and caption, under the names of its official checkpoints."""
