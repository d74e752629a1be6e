"""Log for the package. The application adds the handlers."""

import functools
import logging

logger = logging.getLogger("clore_client")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, but only the first time in this process."""
    logger.warning("%s", text)
