"""A sweep in one folder, for a machine that has torch and neither network nor this program."""
