"""Measures a pipeline: trajectories in, Parquet tables out."""
