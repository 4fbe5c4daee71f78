"""Samples, error samples and traffic of the family mask_sampling."""

from maskops.testing.mask_sampling import laws, split

SAMPLES = split.SAMPLES + laws.SAMPLES
ERRORS = split.ERRORS + laws.ERRORS
TRAFFIC = split.TRAFFIC | laws.TRAFFIC

__all__ = ["ERRORS", "SAMPLES", "TRAFFIC"]
