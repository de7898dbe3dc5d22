"""The command line: each command reads its options and calls one function."""

from potstill.cli.app import app as app
from potstill.cli.base import main as main
from potstill.cli.coarse import coarse as coarse
from potstill.cli.export import export as export
