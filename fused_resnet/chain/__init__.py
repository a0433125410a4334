"""A chain of convolutions, batch norms, ReLUs and adds as one autograd node: what it is made of, and its schedule."""
