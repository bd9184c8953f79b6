"""Commands of ``fbcache`` called in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from fbcache.commands import fbcache


def run(*arguments: Any, columns: int = 200) -> Result:
    """Run a command; what it ends with by itself is in the result, any other exception is raised."""
    result = CliRunner().invoke(fbcache, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def answer(*arguments: Any, code: int = 0) -> Any:
    """Return what a command says in JSON."""
    name, *rest = arguments
    result = run(name, "--json", *rest)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)
