"""A sweep packed into one folder, for a machine that has torch but neither a network nor this program."""
