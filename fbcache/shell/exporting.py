"""``fbcache export``: the value of an entry as a file that other programs read."""

from __future__ import annotations

import os

import click

from fbcache.checkpoint.directory import Directory
from fbcache.checkpoint.manifest import Manifest
from fbcache.codec import MsgpackCodec
from fbcache.demo.report import size
from fbcache.errors import CorruptBlobError, PickleRefusedError, UnsupportedTypeError
from fbcache.shell import screen
from fbcache.shell.blobs import load, path_of
from fbcache.shell.describing import described
from fbcache.shell.ending import Refused, ending
from fbcache.shell.formats import check_fits, format_of
from fbcache.shell.names import name_fields, name_text
from fbcache.shell.opening import Choice, check, choice_options, directory_argument, held, reading, row_of
from fbcache.shell.target import check_target, new_file


@click.command()
@directory_argument
@click.argument("name")
@click.argument("output", type=click.Path(), metavar="OUT")
@choice_options
@click.option("--force", is_flag=True, help="Overwrite OUT if it is there.")
@click.option("--allow-pickle", is_flag=True, help="Load a pickled entry, which runs code from its file.")
@ending()
def export(
    directory: str,
    name: str,
    output: str,
    as_json: bool,
    version: int | None,
    tag: str | None,
    force: bool,
    allow_pickle: bool,
) -> None:
    """Write the entry NAME of DIR to OUT, a .npy, .parquet or .pkl file.

    \b
    .npy      an array without objects or a mask
    .parquet  a table: a dict of one-dimensional arrays of one length, a structured or a
              two-dimensional array, or a pandas DataFrame (needs 'fbcache[parquet]')
    .pkl      any value, by pickle protocol 5

    The entry is held against its checksums first. OUT appears when it is whole. NAME is given as for
    "fbcache info".

    Exit codes: 0, 1 the entry or its checkpoint is damaged, 2 there is no such entry, or it does not fit
    the format, or OUT may not be written, 3 files could not be read or written, 130 interrupted. OUT is
    untouched unless it is 0.
    """
    choice, root = Choice(version, tag), check(directory)
    wanted = format_of(output)
    check_target(output, root, force=force)
    with reading(directory) as (_, inner), held(inner, choice) as manifest:
        row = row_of(inner, manifest, name)
        value = _load(inner, manifest, row, allow_pickle)
        shown = name_text(manifest.names[row])
        check_fits(value, shown, wanted)
        with new_file(output, force=force) as sink:
            wanted.write(value, sink)
    if as_json:
        fields = {
            "directory": root,
            "version": manifest.head.version,
            **name_fields(manifest.names[row]),
            "output": os.path.abspath(output),
            "format": wanted.suffix[1:],
            "nbytes": sink.nbytes,
        }
        screen.tell_json(fields)
    else:
        screen.tell(f"{shown}, {described(value)}, is in {output} ({size(sink.nbytes)})")


def _load(directory: Directory, manifest: Manifest, row: int, allow_pickle: bool) -> object:
    """The value, as views of its file where that is large."""
    key, blob = manifest.keys[row], manifest.blobs[row]
    name = name_text(manifest.names[row])
    if blob.pickled is not None:
        if not allow_pickle:
            raise Refused(
                f"{name} was pickled ({blob.pickled}), and loading it runs code from its file; if you trust "
                "whoever wrote it, add --allow-pickle"
            )
        screen.say(f"Warning: loading {name} runs code from its file ({blob.pickled})", style="yellow")
    frames = load(directory, key, blob)
    try:
        return MsgpackCodec().decode(frames, writable=False, allow_pickle=allow_pickle)
    except CorruptBlobError as error:
        raise CorruptBlobError(error.reason, key=key, path=path_of(directory, key, blob)) from error
    except PickleRefusedError as error:  # its own header does not admit it
        raise CorruptBlobError(str(error), key=key, path=path_of(directory, key, blob)) from error
    except UnsupportedTypeError as error:
        raise Refused(f"{name} cannot be loaded here: {error}") from error
