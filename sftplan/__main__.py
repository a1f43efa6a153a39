"""`python -m sftplan`."""

from sftplan.cli.main import main

main()
