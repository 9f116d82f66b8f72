"""One file per command: ``commands/x.py`` defines ``COMMAND``, and ``modelport x`` is there.

A command parses, calls :mod:`..pipeline` and prints. Everything heavy is imported inside it.
"""
