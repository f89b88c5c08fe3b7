"""Puts the roles together into processes."""
