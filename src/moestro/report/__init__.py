"""What a comparison found, for people: one self-contained HTML file, and a table for the terminal."""
