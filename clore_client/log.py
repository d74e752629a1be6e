"""The logger of the package. The application adds the handlers."""

import logging

logger = logging.getLogger("clore_client")
