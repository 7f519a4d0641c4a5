"""The vision families' image processors, each in a file."""
