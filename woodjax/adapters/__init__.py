"""Thin bridges: from a framework's model to the pure functions that the library takes."""
