"""Long Range Arena (Tay et al. 2020, arXiv 2011.04006): its tasks, and the stack of layers as a classifier of them."""
