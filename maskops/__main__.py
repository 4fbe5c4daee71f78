"""python -m maskops: the same as the command maskops."""

from maskops.cli import main

main()
