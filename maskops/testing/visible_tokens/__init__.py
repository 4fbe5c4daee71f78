"""Samples, error samples and traffic of the family visible_tokens."""

from maskops.testing.visible_tokens.errors import ERRORS
from maskops.testing.visible_tokens.samples import IMAGE, PATCH, SAMPLES, TUBE, VIDEO, split_of
from maskops.testing.visible_tokens.traffic import TRAFFIC, embed_flops

__all__ = ["ERRORS", "IMAGE", "PATCH", "SAMPLES", "TRAFFIC", "TUBE", "VIDEO", "embed_flops", "split_of"]
