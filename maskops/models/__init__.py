"""Thin models of published systems, composed from maskops.nn and maskops.ops. One file per system."""
