"""Orders: create, reconcile, wait, cancel."""
