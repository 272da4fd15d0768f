"""What a container has besides its image: the volume with downloaded weights, and the optional secret."""

from __future__ import annotations

import modal
import modal.exception

MOUNT_PATH = "/cache"


def weights_volume(name: str) -> modal.Volume:
    """Hugging Face files and other caches, kept between containers; made on the first deployment."""
    return modal.Volume.from_name(name, create_if_missing=True)


def optional_secret(name: str) -> list[modal.Secret]:
    """The secret of that name, or nothing where there is none.

    Modal has no optional secrets, so this asks for it while deploying. A container is told the outcome in its
    environment (see `image.py`): it must list the same objects as its deployment did.
    """
    if not name:
        return []
    secret = modal.Secret.from_name(name)
    if not modal.is_local():
        return [secret]
    try:
        secret.hydrate()
    except modal.exception.NotFoundError:
        return []
    except modal.exception.AuthError:
        # Not logged in: nothing can be deployed, and importing this module must work all the same.
        return [secret]
    return [secret]


def keys_of(secrets: list[modal.Secret]) -> set[str] | None:
    """Names of the variables in the optional secret; None where there is none, or nobody is logged in to ask."""
    try:
        for secret in secrets:
            return set(secret._get_keys())
    except modal.exception.AuthError:
        pass
    return None
