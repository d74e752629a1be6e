"""The one logger of the package; it has no handlers, as is due for a library."""

import logging

logger = logging.getLogger("clore_client")
