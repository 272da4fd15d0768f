"""Names in settings that may be folders, and what is said of those that are not there."""

from __future__ import annotations

from pathlib import Path

from neuronpedia_inference.errors import StartupError, did_you_mean

_STARTS = ("/", "./", "../", "~")


def existing_folder(setting: str, text: str) -> Path | None:
    """The folder, or None for a name that is none. Raises StartupError for one that is written as a path and not there.

    setting: its name, for the message. A name with a slash may be a repository of the hub, so only what begins as a
    path does counts as one.
    """
    folder = expanded(setting, text)
    if folder.is_dir():
        return folder
    if text.startswith(_STARTS) or text in (".", ".."):
        raise missing_folder(setting, folder)
    return None


def expanded(setting: str, path: str | Path) -> Path:
    """With the home folder in place of `~`. Raises StartupError for a user who has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise StartupError(f"{setting}: {str(path)!r}: there is no such user's home folder.") from None


def missing_folder(setting: str, folder: Path) -> StartupError:
    """One line with the nearest names beside it."""
    if folder.exists():
        return StartupError(f"{setting}: {str(folder)!r} is a file, not a folder.")
    hint = did_you_mean(str(folder), (str(folder.parent / name) for name in _folders_in(folder.parent)))
    return StartupError(f"{setting}: there is no folder {str(folder)!r}.{hint}")


def folders_beside(text: str) -> list[str]:
    """Folders, as paths, among which one may have been meant by a name that is none."""
    parent = Path(text).parent
    return [f"./{parent / name}" for name in _folders_in(parent)] if not Path(text).is_absolute() else []


def _folders_in(parent: Path) -> list[str]:
    try:
        return [child.name for child in parent.iterdir() if child.is_dir()]
    except OSError:
        return []
