"""Files of variables that a user gives: NAME=VALUE lines, and # before a comment."""

from pathlib import Path

from raymed.config import UserError


def read_variables(path: Path | None, flag: str) -> dict[str, str]:
    """NAME=VALUE lines of a file. Raises UserError for a line that is none; its content is not told.

    flag: by which the file was given.
    """
    if path is None:
        return {}
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    for number, (name, equals, _) in enumerate(pairs, 1):
        if not (equals and name.isidentifier()):
            raise UserError(f"{flag} {path}: line {number} of those with a value is not NAME=VALUE")
    return {name: value for name, _, value in pairs}
