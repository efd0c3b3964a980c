"""Files that change weights of a checkpoint: LoRA in every published form, and textual inversion.

`tensors.py` opens a file, `names.py` finds the weight that each of its keys is for, `forms.py` has the arithmetic of
each form, and `reader.py` puts them together: of a file, for each weight that it changes, a change that can be
evaluated.
"""

from .forms import Change
from .reader import LoraFile, Sum, Weights, combined

__all__ = ["Change", "LoraFile", "Sum", "Weights", "combined"]
