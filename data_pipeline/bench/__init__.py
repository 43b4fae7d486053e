"""The readers of this project and of its peers, measured on the same sequences (`bst bench data`)."""
