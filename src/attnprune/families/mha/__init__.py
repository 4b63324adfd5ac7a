""":class:`torch.nn.MultiheadAttention`."""
