"""Everything that comes from outside passes here: numbers have ranges, text is made visible, files never run code."""
