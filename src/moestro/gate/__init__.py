"""Check all input from outside: numbers against ranges, text for control characters, files so that no code runs."""
