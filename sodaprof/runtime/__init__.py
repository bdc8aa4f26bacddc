"""Runs any legal schedule on a diffusers pipeline."""
