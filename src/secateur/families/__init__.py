"""Kinds of models of which something must be known that no graph shows: no new mechanism, only what to measure on."""

from .diffusion import denoising, diffusion_steps
from .vision_language import ecoflap

__all__ = ["denoising", "diffusion_steps", "ecoflap"]
