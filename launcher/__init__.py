"""Scripts that parse a command line and call the package."""
