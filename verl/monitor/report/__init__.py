"""A report of runs: one page that needs nothing else, no network either.

Run, Watch --document--> plain data: verdicts, settings, series, bands, answers --page--> report.html, by report.js
"""
