"""The subcommands of ``fbcache``, in one group. Needs click and rich."""

from __future__ import annotations

import click

from fbcache import __version__
from fbcache.demo.command import demo
from fbcache.recorder.command import events
from fbcache.saga.command import saga


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fbcache")
def fbcache() -> None:
    """Keep more Python objects alive than fit in memory."""


fbcache.add_command(demo)
fbcache.add_command(events)
fbcache.add_command(saga)
