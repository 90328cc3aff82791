"""What a comparison found, for people: one self-contained HTML file, and a table for the terminal."""

from moestro.report.html import render as render
from moestro.report.html import write_report as write_report
from moestro.report.terminal import print_comparison as print_comparison
