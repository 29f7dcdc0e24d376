"""diffseg: diffusion-synthetic training for semantic segmentation, from a list of words to a trained network."""

import warnings

__version__ = "0.3.0"

# Progress bars are plain text here, so that Papermill can show them; tqdm.auto would ask for widgets at every import.
warnings.filterwarnings("ignore", message="IProgress not found")

from diffseg import miniworld  # noqa: E402, F401  (it registers the name "mini")
