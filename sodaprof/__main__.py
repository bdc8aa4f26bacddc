"""`python -m sodaprof` is the command line."""

from .cli import main

main()
