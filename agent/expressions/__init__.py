"""Prompts and work units for clips of facial expressions, from facial action units (ARGen 3.2)."""
