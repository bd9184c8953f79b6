"""The subcommands of ``fbcache``, in one group. Needs click and rich."""

from __future__ import annotations

import click

from fbcache import __version__
from fbcache.demo.command import demo
from fbcache.recorder.command import events
from fbcache.saga.command import saga
from fbcache.shell.checking import verify
from fbcache.shell.details import info
from fbcache.shell.exporting import export
from fbcache.shell.listing import ls
from fbcache.shell.sweeping import gc


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fbcache")
def fbcache() -> None:
    """Keep more Python objects alive than fit in memory.

    ls, info, verify, export and gc look into the directories that checkpoints are saved to.
    """


for command in (demo, ls, info, verify, export, gc, events, saga):
    fbcache.add_command(command)
