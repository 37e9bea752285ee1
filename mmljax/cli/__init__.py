"""The command line ``mmljax VERB``: one file per verb; it may import every other package."""

from mmljax.cli.command import main as main
