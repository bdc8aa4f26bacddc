"""Presentation: plain data in, rich renderables and picture files out. Nothing here computes or prints."""
