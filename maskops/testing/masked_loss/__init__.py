"""Samples, error samples and traffic of the family masked_loss."""

from maskops.testing.masked_loss import linear, patch, rows

_MODULES = (patch, linear, rows)
SAMPLES = [sample for module in _MODULES for sample in module.SAMPLES]
ERRORS = [sample for module in _MODULES for sample in module.ERRORS]
TRAFFIC = {op: least for module in _MODULES for op, least in module.TRAFFIC.items()}
