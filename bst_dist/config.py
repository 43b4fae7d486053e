"""The recipe: one YAML file that says everything about one run.

Each section is declared beside what it configures; this file only composes them and checks what concerns several
sections at once.
"""
