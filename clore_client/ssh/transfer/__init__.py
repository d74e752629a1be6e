"""Copy files and directories to and from a host."""
