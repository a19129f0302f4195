"""Contexts and chat over HTTP: compressed once, asked many times, many clients at once."""
