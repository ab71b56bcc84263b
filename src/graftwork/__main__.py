"""`python -m graftwork`, as torchrun and accelerate start it."""

from graftwork.cli.main import main

main()
