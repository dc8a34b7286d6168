"""`python -m sctconv`."""

from .cli import main

main(prog_name="sctconv")
