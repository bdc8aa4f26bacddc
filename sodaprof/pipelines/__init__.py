"""Pipelines: loading them, finding their sites, counting their FLOPs; and the reference models that ship."""
