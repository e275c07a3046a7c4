"""What of a project folder goes to other machines: one rule for new nodes, hosts and offline packs.

It is the one by which Ray uploads the folder with a job. A project folder may hold data and secrets that are nobody
else's business, so whoever sends some of it names what that is, and of this what .gitignore and .rayignore leave.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from raymed.config import UserError

_IGNORE = (".gitignore", ".rayignore")
_LOG = logging.getLogger(__name__)


def files(project: Path, names: Iterable[str]) -> list[str]:
    """Files of a project folder that may go, relative to it: `names`, and what is below those that are folders, without
    links, hidden files and what the ignore files there name.

    What is named itself goes, hidden or not, and whatever the project's ignore files say of it; what is not there is
    passed over. Raises UserError for a project without ignore files, whose secrets nobody could tell, and without Ray.
    """
    try:
        from ray._private.runtime_env import packaging
    except ModuleNotFoundError:
        raise UserError("what may leave this folder is told by Ray: pip install 'raymed[train]'") from None
    found: list[str] = []

    def visit(path: Path) -> None:
        if path.is_file():
            found.append(path.relative_to(project).as_posix())

    for name in names:
        left_out = [_hidden(project / name), *(_rule(project / ignore, name) for ignore in _IGNORE)]
        packaging._dir_travel(project / name, left_out, visit, include_gitignore=True, logger=_LOG)
    return sorted(found)


def _hidden(named: Path) -> Callable[[Path], bool]:
    """Whether a path is a link, or hidden and not the one that was named."""
    return lambda path: path.is_symlink() or (path.name.startswith(".") and path != named)


def _rule(ignore: Path, name: str) -> Callable[[Path], bool]:
    """Whether an ignore file of the project leaves a path out, without its lines that leave out the name itself."""
    from ray._private.runtime_env import packaging

    try:
        lines = ignore.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{ignore} cannot be read, and says what stays here: {error.strerror}") from None
    project = ignore.parent
    others = [line for line in lines if not packaging._get_excludes(project, [line])(project / name)]
    return packaging._get_excludes(project, others)
