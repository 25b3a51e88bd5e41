"""Models: which ones, how they are loaded, prepared and adapted, and in which state."""

from staff.models.adapters import LoraSpec as LoraSpec
from staff.models.depth import DepthPruning as DepthPruning
from staff.models.family import Family as Family
from staff.models.spec import ModelSpec as ModelSpec
