"""One prepared run on a GPU box without network: `python3 -m tests.gpu`, see docs/gpu.md.

A module a part; `__main__` runs each in a process of its own with a time limit. `common` holds what parts share.
"""
