"""The command line: each command reads its options and calls one function."""

from potstill.cli.app import app as app
from potstill.cli.app import main as main
