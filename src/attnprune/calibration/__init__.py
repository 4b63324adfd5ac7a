"""What data tell: batches, losses, second moments, and the bases found from them."""
