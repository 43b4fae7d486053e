"""The base of both packages: typed settings, errors for users, and atomic writes of files."""
