"""The command line: one short file per verb; each parses, calls one function and prints."""
