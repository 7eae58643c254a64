"""`python -m fastloop` is `fastloop`."""

from .cli import main

main()
