"""admfast: the ADM diffusion models (ADM, ADM-G, ADM-U), exact and fast.

pipe = admfast.load("digits32")
images = pipe.sample(classes=range(10), seeds=range(10), steps=50)   # uint8 [10, 32, 32, 1]
"""

from admfast import _interrupt  # isort: skip  (before the rest, which takes seconds)
from admfast import solvers
from admfast.errors import AdmfastError
from admfast.models import Classifier, UNet, Upsampler
from admfast.sampling import guides
from admfast.sampling.load import load
from admfast.sampling.pipeline import Pipeline
from admfast.solvers import SOLVERS

__version__ = "0.1.0"
_interrupt.end()
__all__ = [
    "SOLVERS",
    "AdmfastError",
    "Classifier",
    "Pipeline",
    "UNet",
    "Upsampler",
    "__version__",
    "guides",
    "load",
    "solvers",
]
