"""Presentation: plain data in, rich renderables and pictures out. Nothing here computes or prints."""
