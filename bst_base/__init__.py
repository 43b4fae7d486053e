"""What both packages stand on: typed settings, errors for users, files that are whole or absent."""
