"""What a run shows people: progress, curves, images, and a page with all of them."""
