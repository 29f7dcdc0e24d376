"""diffseg: diffusion-synthetic training for semantic segmentation, from a list of words to a trained network."""

__version__ = "0.1.0"
